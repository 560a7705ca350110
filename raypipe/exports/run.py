"""Export: the samples of a keep-list in the form that training tools read, from the source they are in.

Two formats are folders of shards, `webdataset` and `parquet`: each Ray task copies the samples of one shard out of the fragments they
are in. Two are a single file: `indices` and `list`, see `raypipe.exports.index_files`.

A shard holds a fixed number of kept samples in the order of the source, so that the keep-list and that number say what is in
each. `.raypipe/<shard>.json` is written after a shard: a shard that has it, and the size it states, is not made again.
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
from typing import Any

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RaypipeError, RunError, SourceError, StageError
from raypipe.exports.formats import WRITERS, Item, encoded
from raypipe.exports.missing import report_missing
from raypipe.keeplists.file import (
    KeepFile,
    Located,
    check_has_images,
    find_keep_list,
    ids_in_order,
    locate,
    without_gone,
)
from raypipe.progress import Progress
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import injected_noise
from raypipe.runs.run import Run
from raypipe.sources import ClassMap, Fragment, open_source
from raypipe.stages.index.stage import IndexStage

FORMATS = ("indices", "list", "webdataset", "parquet")
STATE = ".raypipe"
"""Folder beside the shards: what was exported, and what is finished. Its name keeps other tools from reading it."""
LAYOUT = 1
"""Version of what is in the shards: an export that another one began is not gone on with."""
SHARD_BYTES = 512 << 20
PROBES, PROBE_SAMPLES = 8, 8
"""How many fragments are looked into to estimate the size of a sample, and how many samples of each."""
OVERHEAD = 3072
"""Bytes of headers, label and JSON beside the image of a sample in a tar."""


@dataclass(frozen=True)
class ExportPart:
    """Kept samples of one fragment: rows `start` to `stop` of the keep-list; of these, in the order of the source, `take` after `skip`."""

    fragment: Fragment
    start: int
    stop: int
    skip: int
    take: int


@dataclass(frozen=True)
class Shard:
    """What one output file holds; `first` is the number of its first sample among all that are kept."""

    name: str
    first: int
    parts: tuple[ExportPart, ...]

    @property
    def samples(self) -> int:
        return sum(part.take for part in self.parts)


@dataclass(frozen=True)
class ExportJob:
    """What every task needs to know."""

    run: str
    source: SourceSettings
    keep_list: str
    to: str
    format: str


def export_keep_list(
    run: Run,
    keep: float | None,
    format: str,
    to: str,
    *,
    shard_samples: int | None = None,
    shard_bytes: int | None = None,
    allow_missing: bool = False,
    force: bool = False,
    snapshot: str | None = None,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """See `raypipe.export`, which this is."""
    if format not in FORMATS:
        raise ConfigError(f"format: {format!r} is not one of {', '.join(FORMATS)}")
    if (shard_samples is not None and shard_samples < 1) or (
        shard_bytes is not None and shard_bytes < 1
    ):
        raise ConfigError("the size of a shard must be at least 1")
    if format not in WRITERS and (shard_samples or shard_bytes):
        raise ConfigError(f"format {format} is a single file, which has no shards")
    check_has_images(run)
    config = run.config()
    if noise := injected_noise(run.ledger()):
        raise RunError(f"{run.uri}: {noise.warning}, and there is nothing to export")
    keep_list = find_keep_list(run, keep, snapshot)
    to = Run(to).uri  # workers have other working directories
    if _within(to, config.source.uri):
        raise ConfigError(
            f"{to}: the output cannot be within the source, {config.source.uri}; give another place"
        )
    context = Context(config, run, progress or Progress(), verbose)
    if not IndexStage().complete(context, run.record("index")):
        context.progress.say(
            f"note: {config.source.uri} is not as it was when it was indexed; files that changed may lack samples"
        )
    located = locate(run, keep_list, snapshot)
    if format not in WRITERS:
        from raypipe.exports.index_files import export_listing

        return export_listing(context, keep_list, located, format, to, allow_missing, force)
    left, gone = without_gone(run, keep_list, located) if snapshot is not None else (located, [])
    state = Run(storage.join(to, STATE))
    with Lease(state):
        return _Export(context, keep_list, left, format, to, allow_missing, gone).make(
            shard_samples, shard_bytes, force
        )


def _within(inner: str, outer: str) -> bool:
    try:
        root = storage.filesystem(storage.glob_root(outer))[1].rstrip("/")
    except RaypipeError:  # such as digits://
        return False
    return (storage.filesystem(inner)[1] + "/").startswith(root + "/")


class _Export:
    """An export to shards."""

    def __init__(
        self,
        context: Context,
        keep_list: str,
        located: Located,
        format: str,
        to: str,
        allow_missing: bool,
        gone: Sequence[tuple[str, str]],
    ) -> None:
        self._context, self._run, self._located, self._gone = context, context.run, located, gone
        self._job = ExportJob(context.run.uri, context.config.source, keep_list, to, format)
        self._to, self._allow_missing = to, allow_missing

    def make(
        self, shard_samples: int | None, shard_bytes: int | None, force: bool
    ) -> dict[str, Any]:
        fragments = [
            fragment
            for fragment in self._run.fragments()
            if fragment.fragment_id in self._located.rows
        ]
        size = self._begin(fragments, shard_samples, shard_bytes, force)
        shards = plan(fragments, self._located, size, self._job.format)
        found = self._finished(shards)
        missing = [shard for shard in shards if shard.name not in found]
        if missing:
            self._context.start_ray()
        with self._context.progress.meter("export", self._located.samples) as meter:
            meter.already(sum(shard.samples for shard in shards if shard.name in found))

            def collect(result: dict[str, Any]) -> None:
                found[result["shard"]] = result
                meter.add(result["samples"] + len(result["missing"]))

            if missing:
                self._context.run_tasks(missing, functools.partial(_write, self._job), collect)
        return self._end(shards, self._finished(shards, every=True))

    def _begin(
        self,
        fragments: list[Fragment],
        shard_samples: int | None,
        shard_bytes: int | None,
        force: bool,
    ) -> int:
        """Samples in a shard; what is in the folder is checked, and the export noted there before its first shard is written."""
        uri = storage.join(self._to, STATE, "export.json")
        about = keep_metadata(self._job.keep_list)
        wanted = {
            "layout": LAYOUT,
            "format": self._job.format,
            "keep_list": self._located.fingerprint,
            "samples": self._located.samples,
        }
        try:
            before = storage.read_json(uri)
        except FileNotFoundError:
            before = None
            there = storage.names(self._to)
            if there and not force:
                raise RunError(
                    f"{self._to}: there is something else here, such as {min(there)}; give a new folder (--force writes here)"
                ) from None
        if before is not None:
            other = [key for key, value in wanted.items() if before.get(key) != value]
            if shard_samples is not None and before["shard_samples"] != shard_samples:
                other.append("shard_samples")
            if (
                shard_bytes is not None
                and shard_samples is None
                and before["shard_bytes"] != shard_bytes
            ):
                other.append("shard_bytes")
            if not other:
                return before["shard_samples"]
            if not force:
                raise RunError(
                    f"{self._to}: holds another export ({before.get('format')}, keep {before.get('keep')}, "
                    f"{before.get('samples')} samples of {before.get('run')}), which differs in {' and '.join(other)}; "
                    "give another folder (--force removes what is there)"
                )
            for number in range(-(-before["samples"] // before["shard_samples"])):
                storage.delete(
                    storage.join(
                        self._to,
                        shard_name(
                            before["format"], number, before["samples"], before["shard_samples"]
                        ),
                    )
                )
            for name in storage.names(storage.join(self._to, STATE)) - {
                "driver.json",
                "export.json",
            }:
                storage.delete(storage.join(self._to, STATE, name))
        limit = shard_bytes or SHARD_BYTES
        size = shard_samples or max(
            1, min(limit // self._sample_bytes(fragments), self._located.samples)
        )
        more = {
            "keep": about.get("fraction"),
            "run": self._run.uri,
            "shard_samples": size,
            "shard_bytes": limit,
        }
        storage.write_json(
            uri, {**wanted, **more, "classes": list(self._run.classes().names), "list": about}
        )
        return size

    def _sample_bytes(self, fragments: list[Fragment]) -> int:
        """Bytes a sample takes in a shard, about: the mean over a few samples here and there."""
        source, sizes = open_source(self._job.source), list[int]()
        for fragment in fragments[:: max(1, len(fragments) // PROBES)][:PROBES]:
            read = source.read(self._run.with_members(fragment))
            for sample in islice(read, PROBE_SAMPLES):
                with contextlib.suppress(SourceError):
                    sizes.append(len(encoded(sample.image)[0]))
        return OVERHEAD + (sum(sizes) // len(sizes) if sizes else 0)

    def _finished(self, shards: Sequence[Shard], every: bool = False) -> dict[str, dict[str, Any]]:
        """What was noted of the shards that are there and whole: by default of those that need not be made again."""
        there = {file.path: file.size for file in storage.listing(self._to) if "/" not in file.path}
        noted = storage.names(storage.join(self._to, STATE))
        candidates = [
            shard for shard in shards if shard.name in there and f"{shard.name}.json" in noted
        ]
        with ThreadPoolExecutor(16) as threads:
            notes = list(
                threads.map(
                    lambda shard: storage.read_json(_note(self._to, shard.name)), candidates
                )
            )
        result = {}
        for shard, note in zip(candidates, notes, strict=True):
            whole = (
                note["bytes"] == there[shard.name]
                and note["samples"] + len(note["missing"]) == shard.samples
            )
            if whole and (every or self._allow_missing or not note["missing"]):
                result[shard.name] = note
        return result

    def _end(self, shards: Sequence[Shard], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Check the sums. Raises StageError where a shard is not whole, or samples are missing that may not be."""
        absent = [shard.name for shard in shards if shard.name not in found]
        if absent:
            raise StageError(
                f"{self._to}: {len(absent)} shards are not whole, such as {absent[0]}; run it again to make them anew"
            )
        missing = [tuple(item) for note in found.values() for item in note["missing"]]
        samples = sum(note["samples"] for note in found.values())
        if samples + len(missing) != self._located.samples:
            raise StageError(
                f"{self._to}: {samples} samples where {self._located.samples} are due; run it again with --force"
            )
        _remove_leftovers(self._to)
        missing += self._gone
        wanted = self._located.samples + len(self._gone)
        report_missing(
            storage.join(self._to, STATE, "missing.json"), missing, wanted, self._allow_missing
        )
        return {
            "format": self._job.format,
            "to": self._to,
            "samples": samples,
            "shards": len(shards),
            "bytes": sum(note["bytes"] for note in found.values()),
            "missing": len(missing),
        }


def _remove_leftovers(to: str) -> None:
    """Remove what writers that were killed have left on a local disk: shards under a temporary name."""
    if storage.is_local(to):
        folder = storage.filesystem(to)[1]
        for name in os.listdir(folder):
            if re.fullmatch(r"\.train-\d{5,}(-of-\d{5,})?\.(tar|parquet)\.[0-9a-f]{32}", name):
                storage.delete(os.path.join(folder, name))


def plan(fragments: Sequence[Fragment], located: Located, size: int, format: str) -> list[Shard]:
    """Shards of `size` samples (the last of what is left), in the order of the source. Raises RunError for a list of other fragments."""
    known = sum(
        stop - start
        for start, stop in (located.rows[fragment.fragment_id] for fragment in fragments)
    )
    if known != located.samples:
        raise RunError(
            f"{located.samples - known:,} samples of the keep-list are in files that are no longer in the index; run `raypipe run` again"
        )
    result: list[Shard] = []
    parts: list[ExportPart] = []

    def end() -> None:
        number = len(result)
        result.append(
            Shard(shard_name(format, number, located.samples, size), number * size, tuple(parts))
        )
        parts.clear()

    for fragment in fragments:
        start, stop = located.rows[fragment.fragment_id]
        skip = 0
        while skip < stop - start:
            take = min(size - sum(part.take for part in parts), stop - start - skip)
            parts.append(ExportPart(fragment, start, stop, skip, take))
            skip += take
            if sum(part.take for part in parts) == size:
                end()
    if parts:
        end()
    return result


def shard_name(format: str, number: int, samples: int, size: int) -> str:
    """train-00000.tar, or train-00000-of-00012.parquet as Hugging Face has it."""
    total = -(-samples // size)
    width = max(5, len(str(total - 1)))
    of = f"-of-{total:0{width}d}" if format == "parquet" else ""
    return f"train-{number:0{width}d}{of}.{WRITERS[format][0]}"


def _note(to: str, shard: str) -> str:
    return storage.join(to, STATE, f"{shard}.json")


def _write(job: ExportJob, shard: Shard) -> dict[str, Any]:
    """Write one shard, then its note. Runs in a task."""
    uri, missing = storage.join(job.to, shard.name), list[tuple[str, str]]()
    with KeepFile(job.keep_list) as kept:
        classes = Run(job.run).classes()
        with storage.Upload(uri) as file:
            samples = WRITERS[job.format][1](
                file, _items(job, shard, kept, classes, missing), classes.names, kept.weighted
            )
    note = {
        "shard": shard.name,
        "samples": samples,
        "bytes": storage.info(uri).size,
        "missing": missing,
    }
    storage.write_json(_note(job.to, shard.name), note)
    return note


def _items(
    job: ExportJob, shard: Shard, kept: KeepFile, classes: ClassMap, missing: list[tuple[str, str]]
) -> Iterator[Item]:
    """The samples of a shard; those that cannot be had go to `missing`, each with its reason."""
    source, run, number = open_source(job.source), Run(job.run), shard.first
    for part in shard.parts:
        rows = {row["sample_id"]: row for row in kept.rows(part.start, part.stop).to_pylist()}
        fragment = run.with_members(part.fragment)
        if part.take < len(rows):
            # those that are gone come last
            order = [
                sample_id
                for sample_id in dict.fromkeys([*ids_in_order(source, fragment), *rows])
                if sample_id in rows
            ]
            rows = {
                sample_id: rows[sample_id] for sample_id in order[part.skip : part.skip + part.take]
            }
        left = dict(rows)
        for sample in source.read(fragment, rows.__contains__):
            row = left.pop(sample.sample_id, None)
            if row is None:
                continue  # a later sample with the same id, which was rejected
            label, wrong = classes.index(sample.label)
            reason = sample.reason or wrong
            if (
                not reason
                and not classes.clusters
                and label != (-1 if row["label"] is None else row["label"])
            ):
                reason = "its label is not the one it was scored with"
            if not reason:
                try:
                    image, extension = encoded(sample.image)
                except SourceError as error:
                    reason = str(error)
            if reason:
                missing.append((sample.sample_id, reason))
            else:
                name = classes.names[row["label"]] if row["label"] is not None else ""
                about = row["score"], row.get("weight")
                yield Item(
                    f"{number:09d}", sample.sample_id, image, extension, row["label"], name, *about
                )
            number += 1
        missing += [(sample_id, "no longer in the source") for sample_id in left]
