"""Write one shard and its note, in a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.exports.formats import Item, encoded
from raypipe.exports.missing import MissingSample
from raypipe.exports.shard_formats import FORMATS
from raypipe.exports.shard_plan import ExportPart, Shard
from raypipe.keeplists.file import KeepFile, ids_in_order
from raypipe.runs.run import Run
from raypipe.sources import ClassMap, Fragment, Source, open_source

STATE = ".raypipe"
"""Folder next to the shards that records what is exported and what is finished. The leading dot
keeps other tools from reading it."""


class ShardNote(TypedDict):
    """What `.raypipe/<shard>.json` records of a finished shard.

    `file` is its path in the export, if that is not its name; empty for a shard without samples
    that has no file. `detail` is what the writer reported.
    """

    shard: str
    samples: int
    bytes: int
    missing: Sequence[tuple[str, str]]
    file: NotRequired[str]
    detail: NotRequired[Mapping[str, Any]]


@dataclass(frozen=True)
class ExportJob:
    """What every task needs to know: URIs of run, keep-list and output folder, source, format."""

    run: str
    source: SourceSettings
    keep_list: str
    to: str
    format: str


def note_uri(to: str, shard: str) -> str:
    """Return where the note of a shard is."""
    return storage.join(to, STATE, f"{shard}.json")


def write_shard(job: ExportJob, shard: Shard) -> ShardNote:
    """Write one shard, then its note, and return the note. Runs in a task."""
    missing = list[MissingSample]()
    with KeepFile(job.keep_list) as keep_list:
        classes = Run(job.run).classes()
        items = _items(job, shard, keep_list, classes, missing)
        write = FORMATS[job.format].write
        written = write(job.to, shard.name, items, classes.names, keep_list.weighted)
    note: ShardNote = {
        "shard": shard.name,
        "samples": written.samples,
        "bytes": storage.info(storage.join(job.to, written.file)).size if written.file else 0,
        "missing": missing,
        "file": written.file,
        "detail": written.detail,
    }
    storage.write_json(note_uri(job.to, shard.name), note)
    return note


def _items(
    job: ExportJob,
    shard: Shard,
    keep_list: KeepFile,
    classes: ClassMap,
    missing: list[MissingSample],
) -> Iterator[Item]:
    """Yield the samples of a shard. Samples that cannot be read are appended to `missing`."""
    source, run, number = open_source(job.source), Run(job.run), shard.first
    for part in shard.parts:
        fragment = run.with_members(part.fragment)
        rows = _rows_of(part, keep_list, source, fragment)
        unread = dict(rows)
        for sample in source.read(fragment, rows.__contains__):
            row = unread.pop(sample.sample_id, None)
            if row is None:
                continue  # a later sample with the same id, which was rejected
            label, label_error = classes.index(sample.label)
            reason = sample.reason or label_error
            expected = -1 if row["label"] is None else row["label"]
            if not reason and not classes.clusters and label != expected:
                reason = "its label is not the one it was scored with"
            if not reason:
                try:
                    image, extension = encoded(sample.image)
                except SourceError as error:
                    reason = str(error)
            if reason:
                missing.append(MissingSample(sample.sample_id, reason))
            else:
                yield Item(
                    key=f"{number:09d}",
                    sample_id=sample.sample_id,
                    image=image,
                    extension=extension,
                    label=row["label"],
                    name=classes.names[row["label"]] if row["label"] is not None else "",
                    score=row["score"],
                    weight=row.get("weight"),
                )
            number += 1
        missing += [MissingSample(sample_id, "no longer in the source") for sample_id in unread]


def _rows_of(
    part: ExportPart, keep_list: KeepFile, source: Source, fragment: Fragment
) -> dict[str, dict[str, Any]]:
    """Return the rows of the keep-list that a part exports, by sample id."""
    rows = {row["sample_id"]: row for row in keep_list.rows(part.start, part.stop).to_pylist()}
    if part.take >= len(rows):
        return rows
    # In source order. Samples that the source no longer has come last.
    candidates = dict.fromkeys([*ids_in_order(source, fragment), *rows])
    order = [sample_id for sample_id in candidates if sample_id in rows]
    return {sample_id: rows[sample_id] for sample_id in order[part.skip : part.skip + part.take]}
