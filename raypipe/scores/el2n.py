"""EL2N: distance of the predicted probabilities from the one-hot label.

    EL2N(x) = E || softmax(f_t(x)) - onehot(y) ||_2

at an early epoch t, averaged over several trainings. Higher (harder) means keep. There is only
one proxy and so only one training; the average is over epochs instead: the first 10, as in the
code of CCS (arXiv 2210.15809). A single epoch is `first_epoch: t, last_epoch: t + 1`.

With `at: checkpoints` (also for `raypipe.scores.loss` and `entropy`) the mean is over the proxy's
checkpoints among these epochs, each in eval mode on images without augmentation. That is what the
paper measures. It works for any sample, including samples that were not trained on.

References
----------
Paul et al., "Deep Learning on a Data Diet", NeurIPS 2021 (arXiv 2107.07075).
"""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory, epoch_range


def score(trajectory: Trajectory, first_epoch: int = 0, last_epoch: int | None = 10) -> np.ndarray:
    """Return EL2N, float32 [samples].

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
        trajectory.distance[epoch_range(trajectory.epochs, first_epoch, last_epoch)]
        .mean(0, dtype=np.float64)
        .astype(np.float32)
    )
