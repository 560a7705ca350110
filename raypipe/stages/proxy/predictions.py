"""Predictions of a training on its own samples, and the trajectory files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raypipe import storage
from raypipe.scores.trajectory import STATISTICS
from raypipe.vision.output_statistics import output_statistics

GROUP_BYTES = 64 << 20
"""Uncompressed size of one row group of all trajectory files together.

The measure stage holds one row group of each file at a time.
"""


@dataclass(frozen=True)
class BatchPredictions:
    """Predictions of n samples in one epoch, as the trajectory stores them.

    Attributes
    ----------
    rows : np.ndarray
        Rows of the samples in the whole seed set, int64 [n].
    statistics : np.ndarray
        The values named by `raypipe.scores.trajectory.STATISTICS`, float32 [n, 4].
    probabilities : np.ndarray
        Class probabilities, float16 [n, classes].
    """

    rows: np.ndarray
    statistics: np.ndarray
    probabilities: np.ndarray


def predictions(rows: np.ndarray, logits: Tensor, target: Tensor) -> BatchPredictions:
    """Return what the trajectory stores of a batch.

    The statistics are computed from the logits, before float16 rounds the probabilities.
    """
    statistics = output_statistics(logits, target)
    return BatchPredictions(
        rows,
        torch.stack([statistics[name] for name in STATISTICS], 1).cpu().numpy(),
        logits.softmax(1).half().cpu().numpy(),
    )


def group_rows(classes: int, epochs: int, workers: int) -> int:
    """Return the number of rows in a row group of a trajectory file."""
    return max(64, GROUP_BYTES // (2 * classes * epochs * workers))


def write_trajectory(uri: str, predicted: Sequence[BatchPredictions], group_size: int) -> None:
    """Write one worker's predictions of one epoch, sorted by row of the seed set.

    Parameters
    ----------
    uri
        The Parquet file.
    predicted
        Predictions of all batches of the epoch.
    group_size
        Rows in a row group.
    """
    rows = np.concatenate([batch.rows for batch in predicted])
    order = np.argsort(rows)
    statistics = np.concatenate([batch.statistics for batch in predicted])[order]
    probabilities = np.concatenate([batch.probabilities for batch in predicted])[order]
    columns: dict[str, Any] = {"row": pa.array(rows[order], pa.int64())}
    columns |= {
        name: pa.array(statistics[:, index], pa.float32()) for index, name in enumerate(STATISTICS)
    }
    # Bytes instead of a list of numbers: Parquet writes and reads a list one number at a time,
    # which is 10 times slower.
    columns["probabilities"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * probabilities.shape[1]), len(rows), [None, pa.py_buffer(probabilities)]
    )
    storage.write_table(uri, pa.table(columns), row_group_size=group_size, dictionary=False)
