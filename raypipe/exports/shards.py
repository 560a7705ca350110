"""Exports in shards: plan them, write each in a Ray task, and check the result.

A shard holds a fixed number of kept samples in source order, so the keep-list and that number
determine the content of each shard. `.raypipe/<shard>.json` is written after a shard. A shard that
has this note, and the size that it states, is not written again.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from raypipe import storage
from raypipe.config.export import ExportSettings
from raypipe.distributed.context import Context
from raypipe.errors import RunError, SourceError, StageError
from raypipe.exports.finished import FinishedExport, FinishedShard
from raypipe.exports.formats import encoded
from raypipe.exports.missing import MissingSample, report_missing
from raypipe.exports.shard_formats import FORMATS, ShardFormat
from raypipe.exports.shard_plan import Shard, plan_shards, shard_name
from raypipe.exports.shard_task import STATE, ExportJob, ShardNote, note_uri, write_shard
from raypipe.keeplists.file import Located
from raypipe.runs.keep_files import keep_metadata
from raypipe.sources import Fragment, open_source
from raypipe.storage import FileInfo

LAYOUT = 1
"""Version of the content of the shards. Exports with another layout version are not resumed."""
SHARD_BYTES = 512 << 20
"""Default size of a shard."""
PROBES, PROBE_SAMPLES = 8, 8
"""Number of fragments, and of samples of each, that are read to estimate the size of a sample."""
OVERHEAD = 3072
"""Bytes of headers, label and JSON that a sample needs in a tar in addition to its image."""


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
        self._format = FORMATS[settings.format]
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
                    remaining, functools.partial(write_shard, self._job), collect
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
            if before.get("format") != self._job.format:
                self._check_folders()
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
        self._check_folders()

    def _check_folders(self) -> None:
        """Raise RunError if files of other origin are where those of the format will be."""
        for folder in self._format.folders:
            if storage.names(storage.join(self._to, folder)):
                raise RunError(
                    f"{self._to}: its folder {folder} contains other files, and a "
                    f"{self._job.format} dataset has a folder of that name; give a new folder"
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
        format = FORMATS[before["format"]]
        shards = [
            shard_name(before["format"], number, samples, size)
            for number in range(-(-samples // size))
        ]
        for name in (*format.files, *shards):
            storage.delete(storage.join(self._to, name))
        for folder in format.folders:
            for name in storage.names(storage.join(self._to, folder)):
                storage.delete(storage.join(self._to, folder, name))
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
        files: dict[str, FileInfo] = {file.path: file for file in storage.listing(self._to)}
        noted = storage.names(storage.join(self._to, STATE))
        candidates = [shard for shard in shards if f"{shard.name}.json" in noted]
        with ThreadPoolExecutor(16) as threads:
            notes: list[ShardNote] = list(
                threads.map(
                    lambda shard: storage.read_json(note_uri(self._to, shard.name)), candidates
                )
            )
        return {
            shard.name: note
            for shard, note in zip(candidates, notes, strict=True)
            if note["bytes"] == _size_of(note, files)
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
        _delete_temporary_shards(self._to, self._format)
        missing += self._gone
        report_missing(
            storage.join(self._to, STATE, "missing.json"),
            missing,
            self._located.samples + len(self._gone),
            self._settings.allow_missing,
        )
        self._finish([notes[shard.name] for shard in shards])
        return {
            "format": self._job.format,
            "to": self._to,
            "samples": samples,
            "shards": len(shards),
            "bytes": sum(note["bytes"] for note in notes.values()),
            "missing": len(missing),
        }

    def _finish(self, notes: Sequence[ShardNote]) -> None:
        """Write the files that describe all shards."""
        shards = [
            FinishedShard(_file_of(note), note["samples"], note["bytes"], note.get("detail", {}))
            for note in notes
            if note["samples"]
        ]
        export = FinishedExport(
            self._run,
            self._job.keep_list,
            self._located.fingerprint,
            self._to,
            self._run.classes().names,
            self._located.weighted,
            self._settings.snapshot,
            shards,
        )
        for name, content in self._format.finish(export).items():
            storage.write_bytes(storage.join(self._to, name), content)


def _file_of(note: ShardNote) -> str:
    """Return the path of a shard's file in the export; empty if it has none."""
    return note.get("file", note["shard"])


def _size_of(note: ShardNote, files: Mapping[str, FileInfo]) -> int | None:
    """Return the size of a shard's file, 0 if it has none; None if the file does not exist."""
    file = _file_of(note)
    if not file:
        return 0
    return files[file].size if file in files else None


def _delete_temporary_shards(to: str, format: ShardFormat) -> None:
    """Delete temporary shards that killed writers left on a local disk."""
    if storage.is_local(to):
        folder = storage.filesystem(to)[1]
        for name in os.listdir(folder):
            if format.temporary.fullmatch(name):
                storage.delete(os.path.join(folder, name))
