"""Assess the samples that are new since the last snapshot: counts, drift, labels and fidelity."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.assessment.drift import Drift, embedding_drift, label_drift
from raypipe.distributed.context import Context
from raypipe.nightly.audit import NewSamples, audit_new_samples, scan_new_samples
from raypipe.nightly.known import KnownSamples, SinceSeed
from raypipe.nightly.policy import (
    Assessment,
    ListedFragment,
    NewFidelity,
    SourceChanges,
    new_fidelity,
    source_changes,
)
from raypipe.nightly.sampling import NO_LIMIT, draw, embeddings_of
from raypipe.nightly.state import Baseline, load_state, read_reference, store_state
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.snapshots import SnapshotEntry, SnapshotManifest
from raypipe.selection.hashing import lowest
from raypipe.sources import Fragment
from raypipe.stages.extrapolate.model import WHOLE_METHODS

LIMIT_KEY = "raypipe.below"
"""Metadata of `arrivals.parquet`: only samples with an order below this were admitted to it."""


@dataclass(frozen=True)
class NewSamplesReport:
    """Assessment of the new samples of a night.

    Attributes
    ----------
    changes : SourceChanges
        Counts of files and samples.
    assessment : Assessment
        Drift, fidelity and growth.
    labels : dict, optional
        Drift of the class shares (`label_drift`); None if nothing is new.
    cpu_seconds : float
        Time that the assessment took.
    state : list of SnapshotEntry
        State for the next nights, in the store.
    """

    changes: SourceChanges
    assessment: Assessment
    labels: dict[str, Any] | None
    cpu_seconds: float
    state: list[SnapshotEntry]

    def as_json(self) -> dict[str, Any]:
        """Return the part of a snapshot that holds the report."""
        drift, fidelity = self.assessment.drift, self.assessment.fidelity
        return {
            **self.changes.as_json(),
            "share_since_seed": self.assessment.share_since_seed,
            "drift": {window: value.as_dict() for window, value in drift.items()},
            "labels": self.labels,
            "fidelity": fidelity.as_json() if fidelity is not None else None,
            "judging_cpu_seconds": self.cpu_seconds,
            "state": self.state,
        }


def listed_fragments(
    scores: Sequence[SnapshotEntry], unreadable: Sequence[SnapshotEntry]
) -> list[ListedFragment]:
    """Return all fragments that a snapshot lists."""
    return [
        ListedFragment(entry["file"], entry["path"], entry["samples"])
        for entry in (*scores, *unreadable)
    ]


def assess_new_samples(
    context: Context,
    previous: SnapshotManifest,
    listed: Sequence[ListedFragment],
    fragments: Sequence[Fragment],
) -> NewSamplesReport:
    """Assess what is new since the previous snapshot.

    Parameters
    ----------
    previous : SnapshotManifest
        The last snapshot.
    listed : sequence of ListedFragment
        The fragments of the run now, as the next snapshot lists them.
    fragments : sequence of Fragment
        The same fragments, from the index.
    """
    run, generation, started = context.run, previous["generation"], time.process_time()
    before = listed_fragments(previous["scores"], previous["unreadable"])
    names = {fragment.name for fragment in before}
    new = [
        fragment
        for fragment in fragments
        if not fragment.error and f"{fragment.fragment_id}.parquet" not in names
    ]
    earlier = SinceSeed.from_table(
        load_state(run, previous, "since"), set(Baseline.read(run, generation).fragments)
    )
    current = {fragment.fragment_id for fragment in fragments}
    by_id = context.config.extrapolate.method in WHOLE_METHODS
    gone = KnownSamples.read(run, previous, current, earlier, by_id)
    rows = scan_new_samples(run, new, context.config.nightly.audit, gone)
    changes = source_changes(
        before,
        listed,
        new=rows.new,
        changed=rows.changed,
        removed=len(gone) - rows.changed - rows.unchanged,
    )
    _log_changes(context, changes)
    since_seed = SinceSeed(
        {
            name: orders
            for name, orders in {**earlier.orders, **rows.since_seed}.items()
            if name in current
        },
        earlier.baseline,
    )
    later = sum(since_seed.count(fragment.fragment_id, fragment.samples) for fragment in fragments)
    drift, arrivals = _measure_drift(context, previous, new, rows)
    fidelity, pairs, audit_seconds = _measure_fidelity(context, previous, new, rows.candidates)
    _log_fidelity(context, fidelity)
    labels = None
    if rows.new + rows.changed:
        seed_counts = np.array(SeedManifest.read(run).per_class, np.int64)
        labels = label_drift(rows.class_counts, seed_counts)
    state = store_state(
        run, generation, arrivals=arrivals, audit=pairs, since=since_seed.as_table()
    )
    return NewSamplesReport(
        changes=changes,
        assessment=Assessment(drift, fidelity, later / max(1, changes.samples["total"])),
        labels=labels,
        cpu_seconds=round(audit_seconds + time.process_time() - started, 2),
        state=state,
    )


def _log_changes(context: Context, changes: SourceChanges) -> None:
    samples, files = (
        ", ".join(f"{counts[kind]:,} {kind}" for kind in ("new", "changed", "removed"))
        for counts in (changes.samples, changes.files)
    )
    context.progress.say(f"nightly     samples: {samples}; files: {files}")


def _log_fidelity(context: Context, fidelity: NewFidelity) -> None:
    if fidelity.spearman is not None:
        interval = " to ".join(f"{bound:.2f}" for bound in fidelity.interval or ())
        context.progress.say(
            f"nightly     fidelity {fidelity.spearman:.2f} ({interval}) on {fidelity.n} new samples"
        )
    elif fidelity.note:
        context.progress.say(f"nightly     fidelity unknown: {fidelity.note}")


# -- fidelity ---------------------------------------------------------------------------


def _measure_fidelity(
    context: Context, previous: SnapshotManifest, new: Sequence[Fragment], candidates: pa.Table
) -> tuple[NewFidelity, pa.Table, float]:
    """Measure candidates of this night, and judge them together with those of earlier nights.

    Returns
    -------
    NewFidelity
    pyarrow.Table
        The newest pairs of measured and predicted scores, at most `nightly.audit`.
    float
        CPU seconds of the measurement in other processes.
    """
    config, run = context.config, context.run
    pairs = load_state(run, previous, "audit")
    if config.scores_embeddings:
        note = f"{config.score} is computed for every sample directly; drift alone is checked"
        return NewFidelity(note=note), pairs, 0.0
    if config.score not in config.measure.at_checkpoints:
        note = (
            f"{config.score} requires training on the sample, so new samples cannot be measured; "
            "drift alone is checked"
        )
        return NewFidelity(note=note), pairs, 0.0
    if not config.nightly.audit:
        note = "nightly.audit is 0, so no new sample is measured; drift alone is checked"
        return NewFidelity(note=note), pairs, 0.0
    seconds = 0.0
    if len(candidates):
        measured, record = audit_new_samples(context, new, candidates)
        seconds = record.cpu_seconds
        filled = [table for table in (measured, pairs) if len(table)]
        pairs = pa.concat_tables(filled).slice(0, config.nightly.audit)
    if not len(pairs):
        return NewFidelity(), pairs, seconds
    fidelity = new_fidelity(
        pairs["predicted"].to_numpy(),
        pairs["measured"].to_numpy(),
        _first_audit(run),
        config.extrapolate.seed,
    )
    return fidelity, pairs, seconds


def _first_audit(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """Return predicted and measured scores of the audit set drawn with the seed set, if any."""
    if "audit.parquet" not in storage.names(run.extrapolator_folder):
        return None
    table = storage.read_table(run.held_out_predictions("audit"), ["predicted", "measured"])
    return table["predicted"].to_numpy(), table["measured"].to_numpy()


# -- drift ------------------------------------------------------------------------------


def _measure_drift(
    context: Context, previous: SnapshotManifest, new: Sequence[Fragment], rows: NewSamples
) -> tuple[dict[str, Drift], pa.Table]:
    """Measure the drift of this night's samples and of all samples since the seed set.

    Returns
    -------
    dict of str to Drift
        By window: "tonight", and "since" if an earlier night had new samples.
    pyarrow.Table
        Random draw of all samples since the seed set, for the next nights.
    """
    run, generation = context.run, previous["generation"]
    old, seed = read_reference(run, generation, "old"), read_reference(run, generation, "seed")
    count = context.config.nightly.drift_samples
    tonight = draw(context, new, count, from_seed_set=False, only=rows.only)
    earlier, limit = _earlier_arrivals(run, previous, rows.kept)
    arrivals = _merge_arrivals(earlier, tonight, limit, count)
    windows = {}
    if len(tonight):
        windows["tonight"] = tonight
    if len(earlier):
        windows["since"] = arrivals
    drifts, reference_ids = {}, set(old["sample_id"].to_pylist()) if len(old) else set()
    for window, table in windows.items():
        # a changed file can hold samples that did not change: present on both sides, they would
        # make the classifier worse than chance
        is_new = [name not in reference_ids for name in table["sample_id"].to_pylist()]
        table = table.filter(pa.array(is_new, pa.bool_()))
        # an empty reference has no embedding width of its own
        sides = (table, *(side if len(side) else table.slice(0, 0) for side in (old, seed)))
        drifts[window] = embedding_drift(*map(embeddings_of, sides))
        _log_drift(context, window, drifts[window])
    return drifts, arrivals


def _log_drift(context: Context, window: str, drift: Drift) -> None:
    figures = drift.note
    if drift.auc is not None and drift.farther is not None:
        figures = f"auc {drift.auc:.2f}, farther {drift.farther:.2f}"
    context.progress.say(f"nightly     drift {window}: {figures}")


def _earlier_arrivals(
    run: Run, previous: SnapshotManifest, kept: Mapping[str, np.ndarray]
) -> tuple[pa.Table, int]:
    """Return the samples of earlier nights that are still in the source, and their limit.

    Parameters
    ----------
    kept : mapping of str to numpy.ndarray
        `order_of` the samples that are in another fragment now, by the new fragment.
    """
    earlier = load_state(run, previous, "arrivals")
    if not len(earlier):
        return earlier, NO_LIMIT
    metadata = earlier.schema.metadata or {}
    limit = int(metadata.get(LIMIT_KEY.encode(), str(NO_LIMIT).encode()))
    scored, orders = run.done("scores"), earlier["order"].to_numpy()
    moved = {
        row: name
        for name, known in kept.items()
        for row in np.flatnonzero(np.isin(orders, known)).tolist()
    }
    fragments = [moved.get(row, name) for row, name in enumerate(earlier["fragment"].to_pylist())]
    column = earlier.column_names.index("fragment")
    earlier = earlier.set_column(column, "fragment", pa.array(fragments, pa.string()))
    in_source = [name in scored for name in fragments]
    return earlier.replace_schema_metadata(None).filter(pa.array(in_source, pa.bool_())), limit


def _merge_arrivals(earlier: pa.Table, tonight: pa.Table, limit: int, count: int) -> pa.Table:
    """Draw up to `count` samples from earlier nights and this one together.

    A sample that an earlier draw left out cannot come back. The lowest order that was ever left
    out is therefore a limit for all later samples as well, which keeps the draw uniform.
    """
    if len(tonight):
        tonight = tonight.filter(pa.array(tonight["order"].to_numpy() < np.uint64(limit)))
    merged = lowest([earlier, tonight], count + 1)
    if len(merged) > count:
        limit, merged = int(merged["order"][count].as_py()), merged.slice(0, count)
    return merged.replace_schema_metadata({LIMIT_KEY: str(limit)})
