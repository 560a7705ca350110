"""The rehearsal of a run: a small run inside it, in `rehearsal/`.

See `raypipe.stages.rehearse` for what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.runs.embeddings import nodes_of
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from raypipe.assessment.rehearsal import Rehearsal

FOLDER = "rehearsal"
"""The inner run, below the run."""
SCORES_FOLDER = "measured"
"""Scores of the trained half, below the inner run."""
SEEN_FOLDER = "seen"
"""Every seed sample as the second proxy sees it, below the inner run."""


def inner_run(run: Run) -> Run:
    """Return the small run inside a run."""
    return Run(run.path(FOLDER))


def read_rehearsal(
    run: Run, score: str, seed_scores: Mapping[str, float]
) -> tuple[list[str], Rehearsal]:
    """Read the rehearsal of a run.

    Parameters
    ----------
    run
        The run.
    score
        Name of the score.
    seed_scores
        The score of every seed sample in the training of the proxy, by id.

    Returns
    -------
    tuple
        Ids of the half that the second proxy was not trained on, and the rehearsal.
    """
    from raypipe.assessment.rehearsal import Rehearsal

    inner = inner_run(run)
    inner_scores: dict[str, float] = {}
    for _, table in storage.iter_tables(inner.path(SCORES_FOLDER)):
        ids, values = table["sample_id"].to_pylist(), table[score].to_pylist()
        inner_scores.update(zip(ids, values, strict=True))
    shards = sorted(storage.iter_tables(inner.path(SEEN_FOLDER)), key=lambda item: item[0])
    table = pa.concat_tables([shard for _, shard in shards])
    trained = table["trained"].to_numpy()
    first, other = (table.filter(pa.array(rows)) for rows in (trained, ~trained))
    first_ids, other_ids = first["sample_id"].to_pylist(), other["sample_id"].to_pylist()
    return other_ids, Rehearsal(
        nodes_of(first),
        np.array([inner_scores[sample_id] for sample_id in first_ids], np.float64),
        nodes_of(other),
        np.array([seed_scores[sample_id] for sample_id in other_ids], np.float64),
    )
