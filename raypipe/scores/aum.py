"""AUM: area under the margin, negated.

With the logits z:

    AUM(x) = (1/T) sum_t [ z_t(y) - max_{j != y} z_t(j) ]

A sample with a low AUM is hard or mislabelled. Pruning that keeps hard samples keeps the low end,
so the score here is -AUM: higher means keep. `softmax: true` takes the margin of the
probabilities instead, as the code of CCS (arXiv 2210.15809) does.

References
----------
Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020
(arXiv 2001.10528).
"""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory


def score(trajectory: Trajectory, softmax: bool = False) -> np.ndarray:
    """Return the negated AUM, float32 [samples].

    Parameters
    ----------
    trajectory : Trajectory
        Predictions of the proxy.
    softmax : bool
        Use the margin of the probabilities instead of that of the logits.
    """
    margin = (
        trajectory.label_probability - trajectory.runner_up_probability
        if softmax
        else trajectory.margin
    )
    return -margin.mean(0, dtype=np.float64).astype(np.float32)
