"""Write score shards, one per fragment."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.errors import StageError
from raypipe.runs.run import Run

SCORE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("score", pa.float32()),
        ("lower", pa.float32()),
        ("upper", pa.float32()),
        ("measured", pa.bool_()),
    ]
)
MEASURED_SCORE = pa.field("measured_score", pa.float32())
"""Column of shards with equal standing: the measured score of samples that have one, else null."""


def write_scores(
    run: Run,
    fragment: str,
    table: pa.Table,
    predicted: np.ndarray,
    half_width: np.ndarray,
    scores: dict[str, float],
    equal_standing: bool = False,
) -> None:
    """Write one score shard.

    A measured sample has its measured score and an interval of width 0, or with equal standing its
    predicted score and interval, like all other samples.

    Parameters
    ----------
    fragment : str
        Name of the fragment.
    table : pyarrow.Table
        Columns sample_id and label, n rows.
    predicted, half_width : numpy.ndarray
        Predicted scores and half the width of their intervals, float32 [n].
    scores : dict of str to float
        Measured scores by id, of seed set and audit set.
    equal_standing : bool
        Whether `score` is the predicted score of every sample. The measured ones are then in a
        column of their own, `MEASURED_SCORE`.

    Raises
    ------
    StageError
        If a score is not finite.
    """
    ids = table["sample_id"].to_pylist()
    measured = np.array([sample_id in scores for sample_id in ids], bool)
    measured_score = np.array([scores.get(sample_id, 0.0) for sample_id in ids], np.float32)
    replaced = measured & (not equal_standing)
    score = np.where(replaced, measured_score, predicted).astype(np.float32)
    if not np.isfinite(score).all():
        count = int((~np.isfinite(score)).sum())
        raise StageError(f"{count} predicted scores of fragment {fragment} are not finite")
    half = np.where(replaced, 0, half_width).astype(np.float32)
    columns = [table["sample_id"], table["label"], score, score - half, score + half, measured]
    shard = pa.table(columns, schema=SCORE_SCHEMA)
    if equal_standing:
        shard = shard.append_column(MEASURED_SCORE, pa.array(measured_score, mask=~measured))
    storage.write_table(run.score_shard(fragment), shard)
