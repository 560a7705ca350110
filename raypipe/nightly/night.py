"""One night: score what is new in the source of a finished run, and write a snapshot.

A night removes what is gone from the source, cuts the keep-lists again and assesses the new
samples. It trains nothing and draws no seed set. Every step depends only on existing files and on
the newest snapshot, which records the state before. A night that was killed at any moment is
therefore repeated by the same command, with the same result.

See `raypipe.nightly.state` for the state that the nights of a run keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from raypipe import storage
from raypipe._version import __version__
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import TrustError
from raypipe.nightly.checks import check_classes, check_complete, check_finished
from raypipe.nightly.new_samples import assess_new_samples, listed_fragments
from raypipe.nightly.policy import Assessment, refresh_reasons, source_changes
from raypipe.nightly.state import write_baseline
from raypipe.pipeline import advance, for_seed_set, make_stage
from raypipe.plugins import code_allowed
from raypipe.progress import Progress
from raypipe.report.trackers import check_trackers
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import StageRecord, fingerprint, now
from raypipe.runs.log_file import log_file
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import remove_extra_shards
from raypipe.runs.snapshots import (
    TIME,
    SnapshotEntry,
    SnapshotManifest,
    expire_snapshots,
    latest_snapshot,
    load_snapshot,
    snapshot_name,
    snapshot_names,
    store_folder,
    write_snapshot,
)
from raypipe.sources import Fragment, open_source

NIGHTLY_STAGES = ("index", "embed", "extrapolate", "select")
"""Stages of every night; `report` follows if `nightly.report` is set."""
FILE_LISTS = ("scores", "keep", "state", "unreadable")
"""Keys of a manifest that list files."""
REFRESH_EXIT_CODE = 4
"""Exit code of a night that advises a refresh."""


@dataclass(frozen=True)
class Night:
    """Result of a night.

    Attributes
    ----------
    uri : str
        The run.
    snapshot : str
        Name of the snapshot that describes the run now.
    wrote_snapshot : bool
        Whether this night wrote that snapshot.
    manifest : dict
        Manifest of that snapshot, without its lists of files.
    advice : list of str
        Reasons for a refresh, as sentences; empty if none is advised.
    refused : str
        Why there are no keep-lists, or "".
    expired : list of str
        Snapshots that this night removed.
    """

    uri: str
    snapshot: str
    wrote_snapshot: bool
    manifest: dict[str, Any]
    advice: list[str]
    refused: str = ""
    expired: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 for success, 3 if the fidelity is too low for keep-lists, 4 if a refresh is advised."""
        if self.refused:
            return TrustError.exit_code
        return REFRESH_EXIT_CODE if self.advice else 0


@code_allowed()
def run_night(
    config: Config,
    *,
    progress: Progress | None = None,
    verbose: bool = False,
    moment: datetime | None = None,
) -> Night:
    """Bring a finished run up to date with its source; write a snapshot if anything changed.

    Parameters
    ----------
    config : Config
        Configuration of the run.
    progress : Progress, optional
        Where to print.
    verbose : bool
        Whether Ray logs to the console.
    moment : datetime, optional
        Time of the night: it names the snapshot and decides which snapshots expire. Default: now.

    Raises
    ------
    RunError
        If there is no finished run, if its settings have changed, or if another driver holds it.
    RaypipeError
        Whatever the stages raise, except a fidelity too low for keep-lists: see `Night.refused`.
    """
    with storage.errors_of_storage(config.run):
        return _run_night(config, progress or Progress(), verbose, moment or datetime.now(UTC))


def _run_night(config: Config, progress: Progress, verbose: bool, moment: datetime) -> Night:
    run, settings = Run(config.run), config.nightly
    if settings.report:
        check_trackers(config.report.log_to)
    run.ledger()  # raises if there is no run, before anything is written
    source = open_source(config.source).resolved_settings(config.proxy.image_size)
    config = config.model_copy(update={"source": source})
    context = Context(for_seed_set(config, run), run, progress, verbose)
    with Lease(run), log_file(run), closing(context):
        records = run.ledger()
        generation = check_finished(context, records)
        run.write_config(config)
        snapshot = latest_snapshot(run)
        is_first = snapshot is None or snapshot["generation"] != generation
        if snapshot is None or is_first:
            snapshot = _write_first_snapshot(context, records, generation, moment)
        refused = _run_stages(context, records, generation)
        fragments = run.fragments()
        files = _SnapshotFiles.collect(run, fragments, snapshot)
        changed = files.differ_from(snapshot) or refused != snapshot["refused"]
        if changed:
            snapshot = _write_next_snapshot(
                context, records, snapshot, fragments, files, refused, moment
            )
        else:
            progress.say(
                f"nightly     nothing new: snapshot {snapshot['name']} still describes the run"
            )
        expired = expire_snapshots(
            run, settings.keep_snapshots, settings.keep_days, moment, clean=changed
        )
        reasons = refresh_reasons(Assessment.from_json(snapshot), settings, config.trust)
        for reason in reasons:
            progress.say(f"nightly     a refresh is advised: {reason}")
    manifest = {key: value for key, value in snapshot.items() if key not in FILE_LISTS}
    return Night(
        run.uri, snapshot["name"], changed or is_first, manifest, reasons, refused, expired
    )


def _run_stages(context: Context, records: dict[str, StageRecord], generation: str) -> str:
    """Run the stages of a night; return why there are no keep-lists, or ""."""
    refused = ""
    for name in (*NIGHTLY_STAGES, *(["report"] if context.config.nightly.report else [])):
        try:
            advance(make_stage(name), context, records)
        except TrustError as error:
            refused = str(error)
            context.progress.say(f"select      {refused}")
        if name == "index":
            check_classes(context.run, generation)
    return refused


# -- snapshots --------------------------------------------------------------------------


@dataclass(frozen=True)
class _SnapshotFiles:
    """Lists of files in a manifest, with the content in the store.

    Attributes
    ----------
    scores : list of SnapshotEntry
        Score shards, with source path and samples of the fragment.
    keep : list of SnapshotEntry
        Keep-lists.
    unreadable : list of SnapshotEntry
        Fragments of source files that cannot be read.
    """

    scores: list[SnapshotEntry]
    keep: list[SnapshotEntry]
    unreadable: list[SnapshotEntry]

    @classmethod
    def collect(
        cls, run: Run, fragments: Sequence[Fragment], previous: SnapshotManifest | None
    ) -> _SnapshotFiles:
        """Store and list the files of the run; those in the previous snapshot are not read."""
        by_file = {f"{fragment.fragment_id}.parquet": fragment for fragment in fragments}
        scores: list[SnapshotEntry] = []
        for entry in store_folder(run, "scores", previous["scores"] if previous else ()):
            fragment = by_file[entry["file"]]
            scores.append({**entry, "path": fragment.path, "samples": fragment.samples})
        unreadable: list[SnapshotEntry] = [
            {"file": file, "path": fragment.path, "samples": 0}
            for file, fragment in sorted(by_file.items())
            if fragment.error
        ]
        keep = store_folder(run, "keep", previous["keep"] if previous else ())
        return cls(scores, keep, unreadable)

    def differ_from(self, snapshot: SnapshotManifest) -> bool:
        """Whether any name or content differs from a snapshot."""
        return _contents(self.scores, self.keep, self.unreadable) != _contents(
            snapshot["scores"], snapshot["keep"], snapshot["unreadable"]
        )

    def as_json(self) -> dict[str, list[SnapshotEntry]]:
        """Return the part of a snapshot that lists files."""
        return {"scores": self.scores, "keep": self.keep, "unreadable": self.unreadable}


def _contents(*lists: Sequence[SnapshotEntry]) -> list[tuple[str, str]]:
    return [(entry["file"], entry.get("hash", "")) for entries in lists for entry in entries]


def _write_first_snapshot(
    context: Context, records: dict[str, StageRecord], generation: str, moment: datetime
) -> SnapshotManifest:
    """Record the run as it was before its first night. Raises RunError if it is not complete."""
    run, fragments = context.run, context.run.fragments()
    check_complete(run, records, fragments)
    write_baseline(context, generation, fragments)
    files = _SnapshotFiles.collect(run, fragments, None)
    listed = listed_fragments(files.scores, files.unreadable)
    select = records.get("select")
    details = {
        **source_changes(listed, listed).as_json(),
        "share_since_seed": 0.0,
        "drift": None,
        "labels": None,
        "fidelity": None,
        "judging_cpu_seconds": 0.0,
        "refused": select.error if select is not None and select.state == "refused" else "",
        "refresh": [],
        "previous": None,
        "state": [],
    }
    return _write(context, records, generation, moment, files, details)


def _write_next_snapshot(
    context: Context,
    records: dict[str, StageRecord],
    previous: SnapshotManifest,
    fragments: Sequence[Fragment],
    files: _SnapshotFiles,
    refused: str,
    moment: datetime,
) -> SnapshotManifest:
    """Assess what is new since the previous snapshot, and write the next one."""
    config = context.config
    listed = listed_fragments(files.scores, files.unreadable)
    report = assess_new_samples(context, previous, listed, fragments)
    details = {
        **report.as_json(),
        "refused": refused,
        "previous": previous["name"],
        "refresh": refresh_reasons(report.assessment, config.nightly, config.trust),
    }
    return _write(context, records, previous["generation"], moment, files, details)


def _write(
    context: Context,
    records: dict[str, StageRecord],
    generation: str,
    moment: datetime,
    files: _SnapshotFiles,
    details: dict[str, Any],
) -> SnapshotManifest:
    """Write a snapshot and read it back."""
    run, name = context.run, _next_name(context.run, moment)
    settings = context.config.model_dump(
        mode="json", exclude={"run", "cluster", "nightly", "report"}
    )
    manifest = {
        "made": now(),
        "raypipe": __version__,
        "generation": generation,
        "config": fingerprint(settings),
        "index": records["index"].detail.get("listing"),
        "score": context.config.score,
        **details,
        **files.as_json(),
    }
    remove_extra_shards(run)
    write_snapshot(run, name, manifest)
    context.progress.say(
        f"nightly     snapshot {name}: {len(files.scores):,} score shards, "
        f"{len(files.keep)} keep-lists"
    )
    return load_snapshot(run, name)


def _next_name(run: Run, moment: datetime) -> str:
    """Return a name above all others, even if a clock went back or a second has two nights."""
    name, newest = snapshot_name(moment), max(snapshot_names(run), default="")
    if name <= newest:
        name = snapshot_name(
            datetime.strptime(newest, TIME).replace(tzinfo=UTC) + timedelta(seconds=1)
        )
    return name
