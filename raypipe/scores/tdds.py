"""TDDS: Temporal Dual-Depth Scoring, as its official code computes it.

With p_t the class probabilities at epoch t and windows k = 0 .. T-J of J epochs:

    d_{k,j} = sum_c | p_{k+j+1}(c) * ( log(p_{k+j+1}(c) + e) - log(p_{k+j}(c) + e) ) |,
              j = 0 .. J-2,   e = 1e-8
    R_k     = || ( d_{k,j} - mean_j d_{k,j} )_j ||_2
    score   = sum_k R_k * beta * (1 - beta)^(T-J-k),    beta = 0.9

Higher means keep. The absolute value is taken per class, inside the sum. With beta 0.9 the last
window has nine tenths of the weight. With T = J there is a single window, so beta is only a
factor. The official code reads the first T epochs (`take: first`), that of arXiv 2506.09010 the
last (`take: last`). The official re-training also re-scales the loss by the mean score of a
batch; this belongs to training, not to the score.

References
----------
Zhang et al., "Spanning Training Progress: Temporal Dual-Depth Scoring (TDDS) for Enhanced Dataset
Pruning", CVPR 2024 (arXiv 2311.13613).
"""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import ScoreError, Trajectory, require_epochs

EPSILON = 1e-8
"""e of the formula."""


def score(
    trajectory: Trajectory,
    epochs: int | None = None,
    window: int = 10,
    beta: float = 0.9,
    take: str = "first",
) -> np.ndarray:
    """Return TDDS, float32 [samples].

    Parameters
    ----------
    trajectory : Trajectory
        Predictions of the proxy.
    epochs : int, optional
        T, number of epochs used. None uses all.
    window : int
        J, epochs in a window; at least 3.
    beta : float
        Weight of the newest window, 0 < beta <= 1.
    take : {"first", "last"}
        Which T epochs to use.

    Raises
    ------
    ScoreError
        If T is smaller than J or larger than the trajectory.
    """
    used = trajectory.epochs if epochs is None else epochs
    require_epochs("tdds", trajectory.epochs, max(used, window), f"epochs {used}, window {window}")
    if used < window:
        raise ScoreError(f"tdds: epochs ({used}) cannot be fewer than window ({window})")
    start = 0 if take == "first" else trajectory.epochs - used
    probabilities = trajectory.probabilities[start : start + used]
    change = np.empty((used - 1, probabilities.shape[1]))
    before, after = np.empty_like(probabilities[0]), np.empty_like(probabilities[0])
    _logarithm(probabilities[0], before)
    # One epoch at a time, reusing two arrays: this loop is most of the work of all trajectory
    # scores together.
    for step in range(used - 1):
        _logarithm(probabilities[step + 1], after)
        np.subtract(after, before, out=before)
        np.abs(before, out=before)
        change[step] = np.einsum("nc,nc->n", probabilities[step + 1], before)
        before, after = after, before
    total = np.zeros(probabilities.shape[1])
    for k in range(used - window + 1):
        # Not by updating sums from window to window: the last windows weigh most, and late
        # changes can be far smaller than early ones.
        part = change[k : k + window - 1]
        deviation = part - part.mean(0)
        total += np.sqrt(np.einsum("jn,jn->n", deviation, deviation)) * (
            beta * (1 - beta) ** (used - window - k)
        )
    return total.astype(np.float32)


def _logarithm(probabilities: np.ndarray, out: np.ndarray) -> None:
    """Write log(p + e) to `out`."""
    np.add(probabilities, np.float32(EPSILON), out=out)
    np.log(out, out=out)
