"""EL2N: distance of the predicted probabilities from the one-hot label.

Source: Paul et al., "Deep Learning on a Data Diet", NeurIPS 2021 (arXiv 2107.07075):

    EL2N(x) = E || softmax(f_t(x)) - onehot(y) ||_2

at an early epoch t, averaged over several trainings. Higher (harder) means keep. With one proxy there is one training, so
the average is over epochs instead: the first 10, as the code of CCS (arXiv 2210.15809) does; a single epoch is
`first_epoch: t, last_epoch: t + 1`.

With `at: checkpoints` (as `raypipe.scores.loss` and `entropy`) the mean is over the proxy's checkpoints among these epochs, each
in eval mode on images that are not augmented: what the paper measures, of any sample, also one that was not trained on.
"""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory, spans


def score(trajectory: Trajectory, first_epoch: int = 0, last_epoch: int | None = 10) -> np.ndarray:
    """EL2N, float32 [samples].

    first_epoch, last_epoch  0-based; the mean is over first_epoch up to and without last_epoch (None: to the end)
    """
    return (
        trajectory.distance[spans(trajectory.epochs, first_epoch, last_epoch)]
        .mean(0, dtype=np.float64)
        .astype(np.float32)
    )
