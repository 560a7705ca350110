"""Cross-entropy loss, averaged over epochs: a plain baseline. Higher (harder) means keep."""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory, epoch_range


def score(
    trajectory: Trajectory, first_epoch: int = 0, last_epoch: int | None = None
) -> np.ndarray:
    """Return -log p(label), averaged over epochs, float32 [samples].

    Parameters
    ----------
    trajectory : Trajectory
        Predictions of the proxy.
    first_epoch, last_epoch : int
        0-based. The mean is over first_epoch up to but excluding last_epoch; None means up to the
        end.

    Raises
    ------
    ScoreError
        If there is no such epoch.
    """
    return (
        trajectory.loss[epoch_range(trajectory.epochs, first_epoch, last_epoch)]
        .mean(0, dtype=np.float64)
        .astype(np.float32)
    )
