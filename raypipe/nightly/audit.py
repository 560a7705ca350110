"""Fresh audit: measure scores at checkpoints for some new samples and compare with the predictions.

New samples are those of `raypipe.nightly.known`. Score shards do not change: the samples keep their
predicted scores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.distributed.context import Context
from raypipe.errors import StageError
from raypipe.nightly.known import KnownSamples
from raypipe.nightly.sampling import order_of
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.selection.hashing import lowest, with_order
from raypipe.sources import Fragment

SALT = 0x6175646974
"""Hash seed of this draw, so that it is independent of all others."""
COLUMNS = ["sample_id", "label", "score", "measured"]


@dataclass(frozen=True)
class NewSamples:
    """Summary of the score shards of new fragments: samples with a score.

    Attributes
    ----------
    new, changed, unchanged : int
        Samples whose id is new, those whose image is another than before, and all others.
    class_counts : numpy.ndarray
        New and changed samples of each class, int64 [classes].
    candidates : pyarrow.Table
        Random draw of the new and changed samples with a label and a predicted score. Columns
        sample_id, label, score, order and fragment.
    only : dict of str to numpy.ndarray
        `order_of` the new and changed samples of each fragment that also has others, uint64.
    kept : dict of str to numpy.ndarray
        `order_of` those others.
    since_seed : dict of str to numpy.ndarray or None
        See `SinceSeed.orders`.
    """

    new: int
    changed: int
    unchanged: int
    class_counts: np.ndarray
    candidates: pa.Table
    only: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    since_seed: dict[str, np.ndarray | None]


def scan_new_samples(
    run: Run, fragments: Sequence[Fragment], count: int, gone: KnownSamples
) -> NewSamples:
    """Read the score shards of new fragments once, and draw `count` candidates for an audit.

    Parameters
    ----------
    gone : KnownSamples
        Samples of the fragments that these replace.
    """
    class_counts, drawn = np.zeros(len(run.classes().names), np.int64), pa.table({})
    new = changed = unchanged = 0
    only: dict[str, np.ndarray] = {}
    kept: dict[str, np.ndarray] = {}
    since_seed: dict[str, np.ndarray | None] = {}
    read = functools.partial(_read_scores, run)
    names = [fragment.fragment_id for fragment in fragments]
    for name, table in storage.ahead(read, names, run.uri):
        orders = order_of(table["sample_id"].combine_chunks())
        compared = gone.compare(orders, table["score"].to_numpy())
        new += int((~compared.known).sum())
        changed += int((compared.known & ~compared.same).sum())
        unchanged += int(compared.same.sum())
        since_seed[name] = None
        if compared.same.any():
            only[name], kept[name] = orders[~compared.same], orders[compared.same]
            since_seed[name] = orders[~compared.same | compared.since_seed]
            table = table.filter(pa.array(~compared.same))
        labels = table["label"].fill_null(-1).to_numpy()
        class_counts += np.bincount(labels[labels >= 0], minlength=len(class_counts))
        rows = np.flatnonzero((labels >= 0) & ~table["measured"].to_numpy())
        table = table.take(pa.array(rows)).drop_columns(["measured"])
        drawn = lowest([drawn, with_order(table, name, SALT)], count)
    return NewSamples(new, changed, unchanged, class_counts, drawn, only, kept, since_seed)


def _read_scores(run: Run, fragment: str) -> pa.Table:
    return storage.read_table(run.score_shard(fragment), COLUMNS)


def audit_new_samples(
    context: Context, fragments: Sequence[Fragment], candidates: pa.Table
) -> tuple[pa.Table, StageRecord]:
    """Measure the scores of candidates.

    Parameters
    ----------
    fragments : sequence of Fragment
        New fragments.
    candidates : pyarrow.Table
        See `NewSamples`. Candidates that can no longer be read are left out.

    Returns
    -------
    pyarrow.Table
        Columns sample_id, label, measured and predicted (both float64), in the order of the draw.
    StageRecord
        Time that it took.

    Raises
    ------
    StageError
        If a score is not finite.
    """
    from raypipe.stages.measure.extra_samples import measure_samples

    config, record = context.config, StageRecord()
    scores = measure_samples(context, record, fragments, candidates)
    by_id = dict(
        zip(scores["sample_id"].to_pylist(), scores[config.score].to_pylist(), strict=True)
    )
    readable = [sample_id in by_id for sample_id in candidates["sample_id"].to_pylist()]
    candidates = candidates.filter(pa.array(readable, pa.bool_()))
    ids = candidates["sample_id"].to_pylist()
    measured = np.array([by_id[sample_id] for sample_id in ids], np.float64)
    if not np.isfinite(measured).all():
        count = int((~np.isfinite(measured)).sum())
        raise StageError(
            f"{config.score} of {count} new samples is not finite, so fidelity cannot be assessed; "
            "set nightly.audit to 0 to skip this check"
        )
    columns = {
        "sample_id": candidates["sample_id"],
        "label": candidates["label"],
        "measured": measured,
        "predicted": candidates["score"].to_numpy().astype(np.float64),
    }
    return pa.table(columns), record
