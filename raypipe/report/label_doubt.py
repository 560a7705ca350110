"""Labels that the proxies contradict: how much, and the order in which to check them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def label_doubt(label: np.ndarray, prediction: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Return how much the proxy contradicts each label, float [n]; NaN for no suspect.

    Parameters
    ----------
    label, prediction
        int [n]; -1 where unknown.
    margin
        float [n]; margin of the label over the best other class.
    """
    suspect = (label >= 0) & (prediction >= 0) & (label != prediction) & np.isfinite(margin)
    return np.where(suspect, -margin, np.nan)


def stored_doubt(label: pa.ChunkedArray, statistics: pa.Table) -> np.ndarray:
    """Return the doubt about labels, float32 [n], from `prediction` and `margin` of a shard."""
    return label_doubt(
        label.fill_null(-1).to_numpy(),
        statistics["prediction"].fill_null(-1).to_numpy(),
        statistics["margin"].to_numpy().astype(np.float64),
    ).astype(np.float32)


def doubt_ranks(doubt: np.ndarray) -> np.ndarray:
    """Return the rank of every doubt from 1, the largest first, int32 [n]; 0 for NaN."""
    rank, listed = np.zeros(len(doubt), np.int32), np.flatnonzero(np.isfinite(doubt))
    order = np.argsort(-doubt[listed], kind="stable")
    rank[listed[order]] = np.arange(1, len(listed) + 1)
    return rank
