"""Rows of the index, one per fragment: from scanned files, and from an existing index."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.run import Run
from raypipe.sources import FileScan, SourceFile, open_source
from raypipe.stages.index.listing import file_id

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
        ("split", pa.string()),
        ("padded", pa.string()),
    ]
)
FRAGMENT_COLUMNS = ("fragment_id", "path", "start", "stop", "offset", "members", "error")
"""Columns with the fields of a `Fragment`."""
CUT_FILE_ID = ""
"""File id of the rows of a file that a limit cut; the file has rows that are not in the index."""

IndexRow = dict[str, Any]
"""One row of an index file, with the columns of `SCHEMA`."""


@dataclass(frozen=True)
class ScannedFiles:
    """Rows of some files by file id, and the processor seconds of the scan."""

    rows: dict[str, list[IndexRow]]
    cpu_seconds: float


def scan_files(settings: SourceSettings, files: Sequence[SourceFile]) -> ScannedFiles:
    """Open some files and return their rows. Runs in a task."""
    watch, source = Stopwatch(), open_source(settings)
    rows = {file_id(file): list(rows_of(file_id(file), source.scan(file))) for file in files}
    return ScannedFiles(rows, watch.lap())


def rows_of(file: str, scan: FileScan) -> Iterator[IndexRow]:
    """Return the rows of a scanned file with this id."""
    classes = json.dumps(scan.class_names) if scan.class_names is not None else ""
    labels = json.dumps(sorted(scan.labels, key=lambda label: (str(type(label)), label)))
    for position, fragment in enumerate(scan.fragments):
        yield {
            "file_id": file,
            **{name: getattr(fragment, name) for name in FRAGMENT_COLUMNS},
            "class_names": classes,
            # only the first row has the file's labels
            "labels": labels if position == 0 else "[]",
            "split": scan.split,
            "padded": " ".join(sorted(scan.padded)) if position == 0 else "",
        }


def limit_samples(rows: Sequence[IndexRow], limit: int | None) -> Iterator[IndexRow]:
    """Return the rows of the first `limit` samples; the last fragment is cut and renamed."""
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


class RowRange(NamedTuple):
    """Some consecutive rows of an index file."""

    index_file: str
    start: int
    stop: int


class ExistingIndex:
    """The rows of an existing index by file id; they are read from storage when they are needed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ranges: dict[str, RowRange] = {}
        self._loaded, self._table = "", pa.table({})
        for index_file, table in storage.iter_tables(run.index_folder, ["file_id"]):
            start = 0
            for file, rows in itertools.groupby(table["file_id"].to_pylist()):
                stop = start + len(list(rows))
                self._ranges[file] = RowRange(index_file, start, stop)
                start = stop
        self._ranges.pop(CUT_FILE_ID, None)

    def __contains__(self, file: str) -> bool:
        return file in self._ranges

    def rows(self, file: str) -> list[IndexRow]:
        """Return the rows of a file."""
        rows = self._ranges[file]
        # files come in the order of the index, so index files are read one after the other
        if rows.index_file != self._loaded:
            self._loaded = rows.index_file
            self._table = storage.read_table(self._run.index_file(rows.index_file))
        result: list[IndexRow] = self._table.slice(rows.start, rows.stop - rows.start).to_pylist()
        return result
