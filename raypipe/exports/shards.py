"""Exports in shards: plan them, write each in a Ray task, and check the result.

A shard holds a fixed number of kept samples in source order, so the keep-list and that number
determine the content of each shard. `.raypipe/<shard>.json` is written after a shard. A shard that
has this note, and the size that it states, is not written again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypedDict

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.config.export import ExportSettings
from raypipe.distributed.context import Context
from raypipe.errors import RunError, SourceError, StageError
from raypipe.exports.formats import WRITERS, Item, encoded
from raypipe.exports.missing import MissingSample, report_missing
from raypipe.keeplists.file import KeepFile, Located, ids_in_order
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.run import Run
from raypipe.sources import ClassMap, Fragment, Source, open_source
from raypipe.storage import FileInfo

STATE = ".raypipe"
"""Folder next to the shards that records what is exported and what is finished. The leading dot
keeps other tools from reading it."""
LAYOUT = 1
"""Version of the content of the shards. Exports with another layout version are not resumed."""
SHARD_BYTES = 512 << 20
"""Default size of a shard."""
PROBES, PROBE_SAMPLES = 8, 8
"""Number of fragments, and of samples of each, that are read to estimate the size of a sample."""
OVERHEAD = 3072
"""Bytes of headers, label and JSON that a sample needs in a tar in addition to its image."""


@dataclass(frozen=True)
class ExportPart:
    """Kept samples of one fragment that go into one shard.

    Attributes
    ----------
    fragment : Fragment
        The fragment.
    start, stop : int
        Rows of the keep-list that belong to the fragment.
    skip, take : int
        Which of them go into the shard: `take` samples after the first `skip`, in source order.
    """

    fragment: Fragment
    start: int
    stop: int
    skip: int
    take: int


@dataclass(frozen=True)
class Shard:
    """Content of one output file; `first` is the number of its first sample among all kept ones."""

    name: str
    first: int
    parts: tuple[ExportPart, ...]

    @property
    def samples(self) -> int:
        """Number of samples that the shard should contain."""
        return sum(part.take for part in self.parts)


class ShardNote(TypedDict):
    """What `.raypipe/<shard>.json` records of a finished shard."""

    shard: str
    samples: int
    bytes: int
    missing: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ExportJob:
    """What every task needs to know: URIs of run, keep-list and output folder, source, format."""

    run: str
    source: SourceSettings
    keep_list: str
    to: str
    format: str


class ShardExport:
    """One export to a folder of shards.

    Parameters
    ----------
    context : Context
        Configuration, run, progress and Ray.
    keep_list : str
        URI of the keep-list.
    located : Located
        The rows of the keep-list that can be exported, by fragment.
    gone : sequence of MissingSample
        Samples of a snapshot's keep-list whose fragments no longer exist.
    settings : ExportSettings
        The options of the export; `to` is absolute.
    """

    def __init__(
        self,
        context: Context,
        keep_list: str,
        located: Located,
        gone: Sequence[MissingSample],
        settings: ExportSettings,
    ) -> None:
        self._context, self._run, self._located, self._gone = context, context.run, located, gone
        self._settings, self._to = settings, settings.to
        self._job = ExportJob(
            context.run.uri, context.config.source, keep_list, settings.to, settings.format
        )

    def check_folder(self) -> None:
        """Raise RunError if the folder holds something else, before anything is written there."""
        if not storage.exists(storage.join(self._to, STATE, "export.json")):
            self._check_empty()

    def write(self) -> dict[str, Any]:
        """Write all shards that are not finished, and return the summary of the export."""
        fragments = [
            fragment
            for fragment in self._run.fragments()
            if fragment.fragment_id in self._located.rows
        ]
        shards = plan_shards(fragments, self._located, self._begin(fragments), self._job.format)
        finished = self._finished(shards)
        if not self._settings.allow_missing:  # try again to read what was missing
            finished = {name: note for name, note in finished.items() if not note["missing"]}
        remaining = [shard for shard in shards if shard.name not in finished]
        if remaining:
            self._context.start_ray()
        with self._context.progress.meter("export", self._located.samples) as meter:
            meter.already(sum(shard.samples for shard in shards if shard.name in finished))

            def collect(note: ShardNote) -> None:
                meter.add(note["samples"] + len(note["missing"]))

            if remaining:
                self._context.run_tasks(
                    remaining, functools.partial(_write_shard, self._job), collect
                )
        return self._summary(shards, self._finished(shards))

    def _begin(self, fragments: list[Fragment]) -> int:
        """Return the samples per shard, after checking the folder.

        The export is recorded in the folder before its first shard is written.
        """
        uri = storage.join(self._to, STATE, "export.json")
        about = keep_metadata(self._job.keep_list)
        identity = {
            "layout": LAYOUT,
            "format": self._job.format,
            "keep_list": self._located.fingerprint,
            "samples": self._located.samples,
        }
        try:
            before = storage.read_json(uri)
        except FileNotFoundError:
            self._check_empty()
        else:
            differences = self._differences(before, identity)
            if not differences:
                return before["shard_samples"]
            if not self._settings.force:
                raise RunError(
                    f"{self._to}: contains another export ({before.get('format')}, keep "
                    f"{before.get('keep')}, {before.get('samples')} samples of "
                    f"{before.get('run')}), which differs in {' and '.join(differences)}; give "
                    "another folder (--force deletes the other export)"
                )
            self._delete_export(before)
        limit = self._settings.shard_bytes or SHARD_BYTES
        size = self._settings.shard_samples or max(
            1, min(limit // self._sample_bytes(fragments), self._located.samples)
        )
        description = {
            "keep": about.get("fraction"),
            "run": self._run.uri,
            "shard_samples": size,
            "shard_bytes": limit,
            "classes": list(self._run.classes().names),
            "list": about,
        }
        storage.write_json(uri, {**identity, **description})
        return size

    def _check_empty(self) -> None:
        """Raise RunError if the folder contains files of other origin, unless `force` is set."""
        files = storage.names(self._to)
        if files and not self._settings.force:
            raise RunError(
                f"{self._to}: contains other files, such as {min(files)}; give a new folder "
                "(--force writes here)"
            )

    def _differences(self, before: dict[str, Any], identity: dict[str, Any]) -> list[str]:
        """Return what distinguishes the recorded export from this one."""
        settings = self._settings
        result = [key for key, value in identity.items() if before.get(key) != value]
        if settings.shard_samples is not None:
            if before["shard_samples"] != settings.shard_samples:
                result.append("shard_samples")
        elif settings.shard_bytes is not None and before["shard_bytes"] != settings.shard_bytes:
            result.append("shard_bytes")
        return result

    def _delete_export(self, before: dict[str, Any]) -> None:
        """Delete the shards and notes of another export."""
        samples, size = before["samples"], before["shard_samples"]
        for number in range(-(-samples // size)):
            name = shard_name(before["format"], number, samples, size)
            storage.delete(storage.join(self._to, name))
        state = storage.join(self._to, STATE)
        for name in storage.names(state) - {"driver.json", "export.json"}:
            storage.delete(storage.join(state, name))

    def _sample_bytes(self, fragments: list[Fragment]) -> int:
        """Estimate the bytes of a sample in a shard, as the mean over a few samples."""
        source, sizes = open_source(self._job.source), list[int]()
        for fragment in fragments[:: max(1, len(fragments) // PROBES)][:PROBES]:
            samples = source.read(self._run.with_members(fragment))
            for sample in islice(samples, PROBE_SAMPLES):
                with contextlib.suppress(SourceError):
                    sizes.append(len(encoded(sample.image)[0]))
        return OVERHEAD + (sum(sizes) // len(sizes) if sizes else 0)

    def _finished(self, shards: Sequence[Shard]) -> dict[str, ShardNote]:
        """Return the notes of the shards that exist and are complete, by name."""
        files: dict[str, FileInfo] = {
            file.path: file for file in storage.listing(self._to) if "/" not in file.path
        }
        noted = storage.names(storage.join(self._to, STATE))
        candidates = [
            shard for shard in shards if shard.name in files and f"{shard.name}.json" in noted
        ]
        with ThreadPoolExecutor(16) as threads:
            notes: list[ShardNote] = list(
                threads.map(
                    lambda shard: storage.read_json(_note_uri(self._to, shard.name)), candidates
                )
            )
        return {
            shard.name: note
            for shard, note in zip(candidates, notes, strict=True)
            if note["bytes"] == files[shard.name].size
            and note["samples"] + len(note["missing"]) == shard.samples
        }

    def _summary(self, shards: Sequence[Shard], notes: dict[str, ShardNote]) -> dict[str, Any]:
        """Return the summary of the export.

        Raises StageError for incomplete shards, wrong sums and missing samples.
        """
        incomplete = [shard.name for shard in shards if shard.name not in notes]
        if incomplete:
            raise StageError(
                f"{self._to}: {len(incomplete)} shards are incomplete, such as {incomplete[0]}; "
                "rerun to write them again"
            )
        missing = [MissingSample(*item) for note in notes.values() for item in note["missing"]]
        samples = sum(note["samples"] for note in notes.values())
        if samples + len(missing) != self._located.samples:
            raise StageError(
                f"{self._to}: {samples} samples instead of {self._located.samples}; rerun with "
                "--force"
            )
        _delete_temporary_shards(self._to)
        missing += self._gone
        report_missing(
            storage.join(self._to, STATE, "missing.json"),
            missing,
            self._located.samples + len(self._gone),
            self._settings.allow_missing,
        )
        return {
            "format": self._job.format,
            "to": self._to,
            "samples": samples,
            "shards": len(shards),
            "bytes": sum(note["bytes"] for note in notes.values()),
            "missing": len(missing),
        }


def _delete_temporary_shards(to: str) -> None:
    """Delete temporary shards that killed writers left on a local disk."""
    if storage.is_local(to):
        folder = storage.filesystem(to)[1]
        for name in os.listdir(folder):
            if re.fullmatch(r"\.train-\d{5,}(-of-\d{5,})?\.(tar|parquet)\.[0-9a-f]{32}", name):
                storage.delete(os.path.join(folder, name))


def plan_shards(
    fragments: Sequence[Fragment], located: Located, size: int, format: str
) -> list[Shard]:
    """Split the kept samples into shards of `size` samples, in source order.

    The last shard can be smaller. Raises RunError if the keep-list has samples of other fragments.
    """
    spans = [located.rows[fragment.fragment_id] for fragment in fragments]
    indexed = sum(stop - start for start, stop in spans)
    if indexed != located.samples:
        raise RunError(
            f"{located.samples - indexed:,} samples of the keep-list are in files that are no "
            "longer in the index; rerun `raypipe run`"
        )
    parts_of_shards: list[list[ExportPart]] = []
    room = 0
    for fragment, (start, stop) in zip(fragments, spans, strict=True):
        skip = 0
        while skip < stop - start:
            if room == 0:
                parts_of_shards.append([])
                room = size
            take = min(room, stop - start - skip)
            parts_of_shards[-1].append(ExportPart(fragment, start, stop, skip, take))
            skip, room = skip + take, room - take
    return [
        Shard(shard_name(format, number, located.samples, size), number * size, tuple(parts))
        for number, parts in enumerate(parts_of_shards)
    ]


def shard_name(format: str, number: int, samples: int, size: int) -> str:
    """Return train-00000.tar, or train-00000-of-00012.parquet, the convention of Hugging Face."""
    total = -(-samples // size)
    width = max(5, len(str(total - 1)))
    of = f"-of-{total:0{width}d}" if format == "parquet" else ""
    return f"train-{number:0{width}d}{of}.{WRITERS[format][0]}"


def _note_uri(to: str, shard: str) -> str:
    return storage.join(to, STATE, f"{shard}.json")


def _write_shard(job: ExportJob, shard: Shard) -> ShardNote:
    """Write one shard, then its note, and return the note. Runs in a task."""
    uri, missing = storage.join(job.to, shard.name), list[MissingSample]()
    with KeepFile(job.keep_list) as keep_list:
        classes = Run(job.run).classes()
        items = _items(job, shard, keep_list, classes, missing)
        with storage.Upload(uri) as file:
            samples = WRITERS[job.format][1](file, items, classes.names, keep_list.weighted)
    note: ShardNote = {
        "shard": shard.name,
        "samples": samples,
        "bytes": storage.info(uri).size,
        "missing": missing,
    }
    storage.write_json(_note_uri(job.to, shard.name), note)
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
