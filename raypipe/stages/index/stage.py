"""Index: list the source's files, count their samples and cut them into fragments.

Writes `index/fragments-*.parquet`, one row per fragment, and `index/classes.json`. Files that are
already in the index with the same size and stamp are not opened again.

The driver holds neither the listing nor the index: files pass through it in order, from the listing
to the index file being filled.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.progress import Meter
from raypipe.runs.duplicates import duplicates_searched
from raypipe.runs.ledger import StageRecord
from raypipe.runs.sizes import INDEX_TASK_FILES
from raypipe.sources import Source, SourceFile, open_source
from raypipe.sources.cuts import Cuts
from raypipe.sources.formats import describe_left_out
from raypipe.sources.noise import requested_noise
from raypipe.stages.base import Stage
from raypipe.stages.index.duplicate_ids import find_duplicates
from raypipe.stages.index.listing import OrderedDigest, RecordedListing, file_id
from raypipe.stages.index.rows import ExistingIndex, IndexRow, ScannedFiles, rows_of, scan_files
from raypipe.stages.index.writer import IndexWriter

CUTS = "cuts"
"""Where `StageRecord.detail` names the rule of the index; up to 0.2.0 it does not."""


class IndexStage(Stage):
    """List and scan the source."""

    name = "index"
    detail = MappingProxyType({CUTS: Cuts.LOWEST_HASH})

    def __init__(self) -> None:
        self._source: Source | None = None
        self._listing: Iterable[SourceFile] | None = None

    def settings(self, config: Config) -> dict[str, Any]:
        noise = {"inject_noise", "noise_seed"} if not config.source.inject_noise else set()
        return config.source.model_dump(
            mode="json",
            exclude={
                "options",
                "transform",
                "max_pixels",
                "bit_depth",
                "max_reject_fraction",
                "version",  # what differs between versions is in the listing
                "download",
                "verify",
                *noise,
            },
        )

    def complete(self, context: Context, record: StageRecord) -> bool:
        config, run = context.config, context.run
        if not storage.exists(run.classes_file) or not duplicates_searched(config, run):
            return False
        self._source = _open(config, record)
        self._listing = RecordedListing(self._source.files())
        # files beyond a limit can change without any effect
        files = record.detail.get("files") if record.detail.get("limited") else None
        listed = itertools.islice(self._listing, files)
        return OrderedDigest(map(file_id, listed)).text() == record.detail.get("listing")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        source, existing, started = (
            self._source or _open(config, record),
            ExistingIndex(run),
            time.process_time(),
        )
        writer = IndexWriter(run, config.source, source.labels_by_name, source.fields_in_samples)
        with context.progress.meter("index", 0, "files") as meter:
            indexing = _Indexing(self._listing or source.files(), source, existing, writer, meter)

            def collect(result: ScannedFiles) -> None:
                record.cpu_seconds += result.cpu_seconds
                indexing.add_scanned(result)

            # with a limit, a group of files could be opened for nothing
            group_size = INDEX_TASK_FILES if config.source.limit is None else 1
            function = functools.partial(scan_files, config.source)
            context.run_tasks(indexing.groups_to_scan(group_size), function, collect)
        record.cpu_seconds += time.process_time() - started
        record.samples = writer.samples
        index = writer.close()
        if index.note:
            context.progress.say(f"note: {index.note}")
        if source.left_out:
            context.progress.say(
                f"note: left out {describe_left_out(source.format, source.left_out)}"
            )
        noise = requested_noise(config.source)
        if noise is not None:
            context.progress.say(f"note: {noise.warning}")
        duplicates, seconds = find_duplicates(config, run, context.run_tasks)
        record.cpu_seconds += seconds
        left_out = {ending: item.files for ending, item in source.left_out.items()}
        kept = {name: record.detail[name] for name in self.detail if name in record.detail}
        record.detail = {**kept, **index.detail, "duplicates": duplicates, "left_out": left_out}


def _open(config: Config, record: StageRecord) -> Source:
    """Open the source, to be divided as it was for the existing index if there is one."""
    source = open_source(config.source)
    source.cuts = Cuts(record.detail.get(CUTS, Cuts.MARKED))
    return source


class _Indexing:
    """Passes the files of a listing to the writer in their order, as soon as their rows are known.

    Rows come from the existing index, from a scan in the driver when that reads nothing, or else
    from a scan in a task, which can finish out of order.
    """

    def __init__(
        self,
        listing: Iterable[SourceFile],
        source: Source,
        existing: ExistingIndex,
        writer: IndexWriter,
        meter: Meter,
    ) -> None:
        self._listing, self._source = listing, source
        self._existing, self._writer, self._meter = existing, writer, meter
        # ids and sizes of the files that are listed but not written, in order
        self._pending: deque[tuple[str, int]] = deque()
        # rows of those that are scanned, by file id
        self._scanned: dict[str, list[IndexRow]] = {}

    def groups_to_scan(self, size: int) -> Iterator[list[SourceFile]]:
        """Read the listing, and yield the files that a task must open, `size` at a time."""
        files = self._files_to_scan()
        while group := list(itertools.islice(files, size)):
            yield group

    def _files_to_scan(self) -> Iterator[SourceFile]:
        for file in self._listing:
            file_key = file_id(file)
            self._pending.append((file_key, file.size))
            self._meter.expect(self._meter.total + 1)
            if file_key not in self._existing and self._source.scan_reads == "nothing":
                self._scanned[file_key] = list(rows_of(file_key, self._source.scan(file)))
            if self._has_rows(file_key):
                self._meter.add(1)
            else:
                yield file
            self._write_pending()
            if self._writer.full:
                return

    def add_scanned(self, result: ScannedFiles) -> None:
        """Take the rows of some files."""
        self._scanned.update(result.rows)
        self._meter.add(len(result.rows))
        self._write_pending()

    def _has_rows(self, file_key: str) -> bool:
        return file_key in self._existing or file_key in self._scanned

    def _write_pending(self) -> None:
        """Write the files at the front of the queue whose rows are known."""
        while self._pending and not self._writer.full:
            file_key, size = self._pending[0]
            if not self._has_rows(file_key):
                return
            self._pending.popleft()
            rows = (
                self._scanned.pop(file_key)
                if file_key in self._scanned
                else self._existing.rows(file_key)
            )
            self._writer.add(file_key, size, rows)
