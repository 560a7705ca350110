"""DUAL: Difficulty and Uncertainty-Aware Lightweight score, for early epochs.

Source: Cho et al., "Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction Uncertainty",
ICML 2025 (arXiv 2502.06905):

    DUAL(x) = mean_k [ std(p_k .. p_{k+J-1}) * (1 - mean(p_k .. p_{k+J-1})) ],    p the label's probability, J = 10

over the first 30 epochs (CIFAR) or 60 (ImageNet). Higher means keep. All windows count; the factor 10 of the official code
does not change the ranking and is left out; its deviation is that of `torch.std` (ddof 1).
"""

from __future__ import annotations

import numpy as np

from raypipe.scores.trajectory import Trajectory, need_epochs, sliding


def score(trajectory: Trajectory, window: int = 10, epochs: int | None = 30) -> np.ndarray:
    """DUAL, float32 [samples].

    window  J, epochs in a window, at least 2
    epochs  only the first so many epochs count; None: all
    Raises ScoreError when there is no window for so few epochs.
    """
    own = trajectory.own[:epochs]
    need_epochs("dual", len(own), window, f"window {window}")
    total = np.zeros(own.shape[1])
    for mean, squares in sliding(own, window):
        total += np.sqrt(squares / (window - 1)) * (1 - mean)
    return (total / (len(own) - window + 1)).astype(np.float32)
