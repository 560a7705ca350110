"""Loss: mean cross-entropy over epochs, a plain baseline. Higher (harder) means keep."""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory, spans


def score(
    trajectory: Trajectory, first_epoch: int = 0, last_epoch: int | None = None
) -> np.ndarray:
    """-log p(label), mean over epochs first_epoch up to and without last_epoch (None: to the end), float32 [samples]."""
    return (
        trajectory.loss[spans(trajectory.epochs, first_epoch, last_epoch)]
        .mean(0, dtype=np.float64)
        .astype(np.float32)
    )
