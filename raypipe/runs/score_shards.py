"""Write score shards, one per fragment."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.errors import StageError
from raypipe.runs.layout import Run

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
    """One score shard; a measured sample, of the seed or the audit set, has its measured score, without an interval around it."""
    ids = table["sample_id"].to_pylist()
    measured = np.array([sample_id in scores for sample_id in ids], bool)
    own = np.array([scores.get(sample_id, 0.0) for sample_id in ids], np.float32)
    score = np.where(measured, own, predicted).astype(np.float32)
    if not np.isfinite(score).all():
        raise StageError(
            f"{int((~np.isfinite(score)).sum())} predicted scores of fragment {fragment} are not finite"
        )
    half = np.where(measured, 0, half_width).astype(np.float32)
    columns = [table["sample_id"], table["label"], score, score - half, score + half, measured]
    storage.write_table(
        run.path("scores", f"{fragment}.parquet"), pa.table(columns, schema=SCORE_SCHEMA)
    )
