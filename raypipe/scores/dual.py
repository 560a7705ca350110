"""DUAL: Difficulty and Uncertainty-Aware Lightweight score, for early epochs.

With the probability p of the label and windows of J = 10 epochs:

    DUAL(x) = mean_k [ std(p_k .. p_{k+J-1}) * (1 - mean(p_k .. p_{k+J-1})) ]

over the first 30 epochs (CIFAR) or 60 (ImageNet). Higher means keep. All windows count. The
standard deviation is that of `torch.std` (ddof 1). The official code multiplies by 10; this does
not change the ranking and is left out.

References
----------
Cho et al., "Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction
Uncertainty", ICML 2025 (arXiv 2502.06905).
"""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory, require_epochs, sliding_moments


def score(trajectory: Trajectory, window: int = 10, epochs: int | None = 30) -> np.ndarray:
    """Return DUAL, float32 [samples].

    Parameters
    ----------
    trajectory : Trajectory
        Predictions of the proxy.
    window : int
        J, epochs in a window; at least 2.
    epochs : int, optional
        Use only this many epochs, the first ones. None uses all.

    Raises
    ------
    ScoreError
        If there are fewer epochs than one window.
    """
    own = trajectory.label_probability[:epochs]
    require_epochs("dual", len(own), window, f"window {window}")
    total = np.zeros(own.shape[1])
    for mean, squares in sliding_moments(own, window):
        total += np.sqrt(squares / (window - 1)) * (1 - mean)
    return (total / (len(own) - window + 1)).astype(np.float32)
