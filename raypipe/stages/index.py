"""Index: lists the source's files, counts their samples and cuts them into fragments.

Writes `index/fragments-*.parquet`, one row per fragment, and `index/classes.json`. Files that are in the index already,
with the same size and stamp, are not opened again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import Config, SourceSettings
from raypipe.errors import SourceError
from raypipe.rundir import Run, StageRecord, content_hash
from raypipe.sources import FileScan, SourceFile, open_source
from raypipe.stages.base import Context, Stage
from raypipe.stages.classes import settle_classes, write_classes
from raypipe.stages.duplicates import are_found, find_duplicates
from raypipe.stages.rejects import FileTally

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
PART_FRAGMENTS, PART_MEMBERS = 10_000, 65_536
"""An index file ends after so many fragments, or so many names of small files: a worker reads one to find its members."""
SCAN_FILES = 32
"""Files opened in one task."""


class IndexStage(Stage):
    name = "index"

    def settings(self, config: Config) -> dict[str, Any]:
        return config.source.model_dump(mode="json", exclude={"max_pixels", "max_reject_fraction"})

    def complete(self, context: Context, record: StageRecord) -> bool:
        if not storage.exists(context.run.path("index", "classes.json")) or not are_found(context.config, context.run):
            return False
        listed = content_hash(_file_id(file) for file in open_source(context.config.source).files())
        return listed == record.detail.get("listing")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        known = _known(run)
        files = list(open_source(config.source).files())
        scans: dict[str, list[dict[str, Any]]] = {}
        new = [file for file in files if _file_id(file) not in known]
        with context.progress.meter("index", len(files), "files") as meter:
            meter.already(len(files) - len(new))

            def collect(result: dict[str, Any]) -> None:
                scans.update(result["rows"])
                record.cpu_seconds += result["cpu_seconds"]
                meter.add(len(result["rows"]))

            if new:
                groups = [new[start : start + SCAN_FILES] for start in range(0, len(new), SCAN_FILES)]
                _run_tasks(context, groups, functools.partial(_scan, config.source), collect)
        rows = [row for file in files for row in known.get(_file_id(file)) or scans[_file_id(file)]]
        rows = _limited(rows, config.source.limit)
        self._check(config.source, rows)
        note = _write(run, rows, config.source.num_classes)
        if note:
            context.progress.say(f"note: {note}")
        _check_files(config.source, files, rows)
        duplicates, seconds = find_duplicates(config, run, functools.partial(_run_tasks, context))
        record.cpu_seconds += seconds
        record.samples = sum(row["stop"] - row["start"] for row in rows)
        record.detail = {
            "listing": content_hash(_file_id(file) for file in files),
            "content": content_hash(row["fragment_id"] for row in rows),
            "files": len(files),
            "fragments": sum(not row["error"] for row in rows),
            "unreadable_files": sum(bool(row["error"]) for row in rows),
            "bytes": sum(file.size for file in files),
            "classes": len(run.classes().names),
            "duplicates": duplicates,
        }

    @staticmethod
    def _check(settings: SourceSettings, rows: list[dict[str, Any]]) -> None:
        if any(row["stop"] > row["start"] for row in rows):
            return
        reasons = [f"{row['path']}: {row['error']}" for row in rows if row["error"]]
        detail = "; ".join(reasons[:3]) or "no samples in any file"
        raise SourceError(f"{settings.uri}: nothing can be read ({detail})")


def _run_tasks(context: Context, units: Sequence[Any], function: Any, on_result: Any) -> None:
    if units:
        from raypipe.stages.streaming import run_tasks

        context.cluster  # Ray is started before tasks are made
        run_tasks(units, function, on_result)


def _check_files(settings: SourceSettings, files: list[SourceFile], rows: list[dict[str, Any]]) -> None:
    """Raises RejectError when too much of the source is in files that cannot be read."""
    sizes, tally = {_file_id(file): file.size for file in files}, FileTally()
    for file_id, of_file in itertools.groupby(rows, key=lambda row: row["file_id"]):
        tally.add(sizes[file_id], list(of_file))
    tally.check(settings.max_reject_fraction)


def _file_id(file: SourceFile) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for item in (file.path, str(file.size), file.stamp, *file.members):
        digest.update(item.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _scan(settings: SourceSettings, files: list[SourceFile]) -> dict[str, Any]:
    """Rows of the index for some files, by file id. Runs in a task."""
    from raypipe.stages.streaming import Stopwatch

    watch, source = Stopwatch(), open_source(settings)
    rows = {_file_id(file): list(_rows(_file_id(file), source.scan(file))) for file in files}
    return {"rows": rows, "cpu_seconds": watch.lap()}


def _rows(file_id: str, scan: FileScan) -> Iterator[dict[str, Any]]:
    classes = json.dumps(scan.class_names) if scan.class_names is not None else ""
    labels = json.dumps(sorted(scan.labels, key=lambda label: (str(type(label)), label)))
    for position, fragment in enumerate(scan.fragments):
        row = dataclasses.asdict(fragment)
        del row["part"]
        # the file's labels stand in its first row only
        yield {"file_id": file_id, **row, "class_names": classes, "labels": labels if position == 0 else "[]"}


def _known(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Rows of an earlier index by file, with the last file left out where a limit may have cut it."""
    result: dict[str, list[dict[str, Any]]] = {}
    last = ""
    for _, table in storage.iter_tables(run.path("index")):
        for row in table.to_pylist():
            result.setdefault(row["file_id"], []).append(row)
            last = row["file_id"]
    result.pop(last, None)
    return result


def _limited(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` samples; the fragment on the border is shortened and renamed."""
    if limit is None:
        return rows
    result, count = [], 0
    for row in rows:
        if count >= limit:
            break
        size = row["stop"] - row["start"]
        if count + size > limit:
            stop = row["start"] + limit - count
            members = list(row["members"])[: limit - count] if len(row["members"]) == size else row["members"]
            row = {**row, "stop": stop, "fragment_id": f"{row['fragment_id']}-{limit - count}", "members": members}
        result.append(row)
        count += size
    return result


def _write(run: Run, rows: Iterable[dict[str, Any]], num_classes: int | None) -> str:
    """Write the index. Returns what the user should know of the classes."""
    names: tuple[str, ...] | None = None
    labels: set[int | str] = set()
    part: list[dict[str, Any]] = []
    written: set[str] = set()

    def flush() -> None:
        name = f"fragments-{len(written):05d}.parquet"
        storage.write_table(run.path("index", name), pa.Table.from_pylist(part, schema=SCHEMA))
        written.add(name)
        part.clear()

    members = 0
    for row in rows:
        if row["class_names"] and not row["error"]:
            stated = tuple(json.loads(row["class_names"]))
            if names is not None and stated != names:
                raise SourceError(
                    f"{row['path']} states other class names than the files before it; give source.include to read only one kind"
                )
            names = stated
        labels.update(json.loads(row["labels"]))
        part.append(row)
        members += len(row["members"])
        if len(part) >= PART_FRAGMENTS or members >= PART_MEMBERS:
            flush()
            members = 0
    if part:
        flush()
    classes, note = settle_classes(run, names, frozenset(labels), num_classes)
    write_classes(run, classes)
    for name in storage.names(run.path("index")) - written - {"classes.json"}:
        storage.delete(run.path("index", name))
    return note
