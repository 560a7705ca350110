"""Index: lists the source's files, counts their samples and cuts them into fragments.

Writes `index/fragments-*.parquet`, one row per fragment, and `index/classes.json`. Files that are in the index already,
with the same size and stamp, are not opened again.

The driver holds neither the listing nor the index: files pass through it in their order, from the listing to the index file being
filled. An index file is named after its content, so that what an interrupted attempt wrote can be taken up and stays apart from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import Config, SourceSettings
from raypipe.distributed.context import Context
from raypipe.errors import SourceError
from raypipe.runs.duplicates import duplicates_searched
from raypipe.runs.ledger import StageRecord, content_hash
from raypipe.runs.rejects import UnreadableFiles
from raypipe.runs.run import Run
from raypipe.runs.sizes import INDEX_FILE_FRAGMENTS, INDEX_FILE_MEMBERS, INDEX_TASK_FILES
from raypipe.sources import ClassMap, FileScan, SourceFile, open_source
from raypipe.sources.noise import requested_noise
from raypipe.stages.base import Stage
from raypipe.stages.index.classes import settle_classes, write_classes
from raypipe.stages.index.duplicate_ids import find_duplicates

SCHEMA = pa.schema(
    [
        ("file_id", pa.string()),
        ("fragment_id", pa.string()),
        ("path", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("offset", pa.int64()),
        ("members", pa.list_(pa.string())),
        ("error", pa.string()),
        ("class_names", pa.string()),
        ("labels", pa.string()),
    ]
)
CUT = ""
"""File id of rows that a limit cut: the file has others beside them."""
OF_FRAGMENT = ("fragment_id", "path", "start", "stop", "offset", "members", "error")


class IndexStage(Stage):
    name = "index"

    def __init__(self) -> None:
        self._listing: Iterable[SourceFile] | None = None

    def settings(self, config: Config) -> dict[str, Any]:
        noise = {"inject_noise", "noise_seed"} if not config.source.inject_noise else set()
        return config.source.model_dump(
            mode="json", exclude={"max_pixels", "max_reject_fraction", "download", "verify", *noise}
        )

    def complete(self, context: Context, record: StageRecord) -> bool:
        if not storage.exists(context.run.classes_file) or not duplicates_searched(
            context.config, context.run
        ):
            return False
        self._listing = Recorded(open_source(context.config.source).files())
        # what a limit left out may change without any effect
        part = itertools.islice(
            self._listing, record.detail.get("files") if record.detail.get("limited") else None
        )
        return _Digest(map(_file_id, part)).text() == record.detail.get("listing")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        source, known, started = open_source(config.source), _Known(run), time.process_time()
        index = _Writer(run, config.source)
        waiting: deque[tuple[str, int]] = (
            deque()
        )  # file id and bytes of what is listed and not written, in order
        rows: dict[str, list[dict[str, Any]]] = {}
        with context.progress.meter("index", 0, "files") as meter:

            def write() -> None:
                while waiting and not index.full:
                    file_id, size = waiting[0]
                    if file_id not in rows and file_id not in known:
                        return
                    waiting.popleft()
                    index.add(
                        file_id, size, rows.pop(file_id) if file_id in rows else known.rows(file_id)
                    )

            def unknown() -> Iterator[SourceFile]:
                """The files that have to be opened; the others are written as their turn comes."""
                for file in self._listing or source.files():
                    file_id = _file_id(file)
                    waiting.append((file_id, file.size))
                    meter.expect(meter.total + 1)
                    if file_id not in known and source.scan_reads == "nothing":
                        rows[file_id] = list(_rows(file_id, source.scan(file)))
                    if file_id in known or file_id in rows:
                        meter.add(1)
                    else:
                        yield file
                    write()
                    if index.full:
                        return

            def collect(result: dict[str, Any]) -> None:
                rows.update(result["rows"])
                record.cpu_seconds += result["cpu_seconds"]
                meter.add(len(result["rows"]))
                write()

            new = unknown()
            most = (
                INDEX_TASK_FILES if config.source.limit is None else 1
            )  # with a limit, few files are opened that are not needed
            groups = iter(lambda: list(itertools.islice(new, most)), [])
            context.run_tasks(groups, functools.partial(_scan, config.source), collect)
        record.cpu_seconds += time.process_time() - started
        record.samples = index.samples
        detail, note = index.close()
        if note:
            context.progress.say(f"note: {note}")
        noise = requested_noise(config.source)
        if noise is not None:
            context.progress.say(f"note: {noise.warning}")
        duplicates, seconds = find_duplicates(config, run, context.run_tasks)
        record.cpu_seconds += seconds
        record.detail = {**detail, "duplicates": duplicates}


def _file_id(file: SourceFile) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for item in (file.path, str(file.size), file.stamp, *file.members):
        digest.update(item.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _scan(settings: SourceSettings, files: list[SourceFile]) -> dict[str, Any]:
    """Rows of the index for some files, by file id. Runs in a task."""
    from raypipe.distributed.usage import Stopwatch

    watch, source = Stopwatch(), open_source(settings)
    rows = {_file_id(file): list(_rows(_file_id(file), source.scan(file))) for file in files}
    return {"rows": rows, "cpu_seconds": watch.lap()}


def _rows(file_id: str, scan: FileScan) -> Iterator[dict[str, Any]]:
    classes = json.dumps(scan.class_names) if scan.class_names is not None else ""
    labels = json.dumps(sorted(scan.labels, key=lambda label: (str(type(label)), label)))
    for position, fragment in enumerate(scan.fragments):
        row = {name: getattr(fragment, name) for name in OF_FRAGMENT}
        # the file's labels stand in its first row only
        yield {
            "file_id": file_id,
            **row,
            "class_names": classes,
            "labels": labels if position == 0 else "[]",
        }


class Recorded:
    """Files that can be gone through again without asking storage again: those seen so far lie in a temporary file."""

    def __init__(self, files: Iterator[SourceFile]) -> None:
        self._files, self._seen = files, tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as this object)

    def __iter__(self) -> Iterator[SourceFile]:
        self._seen.seek(0)
        for line in self._seen:
            path, size, stamp, members = json.loads(line)
            yield SourceFile(path, size, stamp, tuple(members))
        self._seen.seek(0, os.SEEK_END)
        for file in self._files:
            self._seen.write(json.dumps([file.path, file.size, file.stamp, file.members]) + "\n")
            yield file


class _Known:
    """The rows of an index that is there, by file; they stay on storage until they are asked for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._place: dict[str, tuple[str, int, int]] = {}
        self._part, self._table = "", pa.table({})
        for part, table in storage.iter_tables(run.index_folder, ["file_id"]):
            start = 0
            for file_id, rows in itertools.groupby(table["file_id"].to_pylist()):
                count = len(list(rows))
                self._place[file_id] = part, start, count
                start += count
        self._place.pop(CUT, None)

    def __contains__(self, file_id: str) -> bool:
        return file_id in self._place

    def rows(self, file_id: str) -> list[dict[str, Any]]:
        part, start, count = self._place[file_id]
        if (
            part != self._part
        ):  # files come in the order of the index, so that its parts are read one after the other
            self._part, self._table = part, storage.read_table(self._run.index_file(part))
        return self._table.slice(start, count).to_pylist()


class _Writer:
    """Fills index files one after the other, up to the limit of samples, and adds up what there is to say of all of them."""

    def __init__(self, run: Run, settings: SourceSettings) -> None:
        self._run, self._settings = run, settings
        self._old = {name for name in storage.names(run.index_folder) if name != "classes.json"}
        self._part: list[dict[str, Any]] = []
        self._members = 0
        self._written: set[str] = set()
        self._listed, self._content = _Digest(), _Digest()
        self._labels: set[int | str] = set()
        self._names = ""
        self._problems: list[str] = []
        self._tally = UnreadableFiles()
        self._counts = {"files": 0, "fragments": 0, "unreadable_files": 0, "bytes": 0}
        self.samples = 0

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._settings.limit is not None and self.samples >= self._settings.limit

    def add(self, file_id: str, size: int, rows: list[dict[str, Any]]) -> None:
        """The next file of the listing. Raises SourceError where its classes are others than those of the files before it."""
        self._listed.add(file_id)
        self._counts["files"] += 1
        self._counts["bytes"] += size
        kept = list(
            _limited(
                rows, None if self._settings.limit is None else self._settings.limit - self.samples
            )
        )
        if kept != rows:
            kept = [{**row, "file_id": CUT} for row in kept]
        self._tally.add(size, kept)
        for row in kept:
            self._add(row)
        if len(self._part) >= INDEX_FILE_FRAGMENTS or self._members >= INDEX_FILE_MEMBERS:
            self._flush()

    def _add(self, row: dict[str, Any]) -> None:
        self._content.add(row["fragment_id"])
        self.samples += row["stop"] - row["start"]
        if row["error"]:
            self._counts["unreadable_files"] += 1
            self._problems += [f"{row['path']}: {row['error']}"] * (len(self._problems) < 3)
        else:
            self._counts["fragments"] += 1
            if row["class_names"] not in ("", self._names):
                if self._names:
                    raise SourceError(
                        f"{row['path']} states other class names than the files before it; give source.include to read only one kind"
                    )
                self._names = row["class_names"]
        if row["labels"] != "[]":
            self._labels.update(json.loads(row["labels"]))
        self._part.append(row)
        self._members += len(row["members"])

    def _flush(self) -> None:
        name = f"fragments-{len(self._written):05d}-{content_hash(json.dumps(row, sort_keys=True) for row in self._part)}.parquet"
        if name not in self._old:
            storage.write_table(
                self._run.index_file(name), pa.Table.from_pylist(self._part, schema=SCHEMA)
            )
        self._written.add(name)
        self._part, self._members = [], 0

    def close(self) -> tuple[dict[str, Any], str]:
        """Finish the index. Returns what the ledger says of it, and what the user should know of the classes.

        Raises SourceError where nothing can be read, RejectError where too much is in files that cannot be.
        """
        if self._part:
            self._flush()
        if not self.samples:
            self._run.clear("index")
            raise SourceError(
                f"{self._settings.uri}: nothing can be read ({'; '.join(self._problems) or 'no samples in any file'})"
            )
        names = tuple(json.loads(self._names)) if self._names else None
        classes, note = ClassMap((), numeric=False, clusters=True), ""
        if self._settings.label_column is not None:
            classes, note = settle_classes(
                self._run, names, frozenset(self._labels), self._settings.num_classes
            )
        noise = requested_noise(self._settings)
        if noise is not None and len(classes.names) < 2:
            self._run.clear("index")
            raise SourceError(
                f"source.inject_noise: {self._settings.uri} has {len(classes.names)} classes, so there is no label to replace by another; "
                "leave it out, or give a source with labels"
            )
        write_classes(self._run, dataclasses.replace(classes, noise=noise))
        for name in self._old - self._written:
            storage.delete(self._run.index_file(name))
        self._tally.check(self._settings.max_reject_fraction)
        found = {
            "listing": self._listed.text(),
            "content": self._content.text(),
            "classes": len(classes.names),
        }
        replaced = {"inject_noise": dataclasses.asdict(noise)} if noise is not None else {}
        return {**found, **self._counts, "limited": self.full, **replaced}, note


def _limited(rows: list[dict[str, Any]], limit: int | None) -> Iterator[dict[str, Any]]:
    """The first `limit` samples; the fragment on the border is shortened and renamed."""
    count = 0
    for row in rows:
        if limit is not None and count >= limit:
            return
        size = row["stop"] - row["start"]
        if limit is not None and count + size > limit:
            left = limit - count
            members = list(row["members"])[:left] if len(row["members"]) == size else row["members"]
            row = {
                **row,
                "stop": row["start"] + left,
                "fragment_id": f"{row['fragment_id']}-{left}",
                "members": members,
            }
        yield row
        count += size


class _Digest:
    """A short hash of names in their order."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._digest = hashlib.blake2b(digest_size=8)
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        self._digest.update(name.encode() + b"\0")

    def text(self) -> str:
        return self._digest.hexdigest()
