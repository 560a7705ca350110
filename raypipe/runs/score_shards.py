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


def write_scores(
    run: Run,
    fragment: str,
    table: pa.Table,
    predicted: np.ndarray,
    half_width: np.ndarray,
    scores: dict[str, float],
) -> None:
    """Write one score shard.

    A measured sample has its measured score and an interval of width 0.

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

    Raises
    ------
    StageError
        If a score is not finite.
    """
    ids = table["sample_id"].to_pylist()
    measured = np.array([sample_id in scores for sample_id in ids], bool)
    measured_score = np.array([scores.get(sample_id, 0.0) for sample_id in ids], np.float32)
    score = np.where(measured, measured_score, predicted).astype(np.float32)
    if not np.isfinite(score).all():
        count = int((~np.isfinite(score)).sum())
        raise StageError(f"{count} predicted scores of fragment {fragment} are not finite")
    half = np.where(measured, 0, half_width).astype(np.float32)
    columns = [table["sample_id"], table["label"], score, score - half, score + half, measured]
    storage.write_table(run.score_shard(fragment), pa.table(columns, schema=SCORE_SCHEMA))
