"""Dynamic Uncertainty: how much the label's probability still moves while the proxy learns.

Source: He et al., "Large-scale Dataset Pruning with Dynamic Uncertainty", CVPR workshops 2024 (arXiv 2306.05175):

    U_k(x) = std( p_k(y|x), ..., p_{k+J-1}(y|x) ),      U(x) = mean_k U_k(x),      J = 10

Higher means keep, as in the paper. Where implementations differ, the official code decides: the sample standard deviation
(ddof 1), and all windows but the one ending at the last epoch. The code of arXiv 2506.09010 (`variant: extrapolation`) uses
the population deviation and skips the first two epochs, but keeps the last window. The paper's mean over all windows is
`variant: paper`. A factor (the official code has 10) or ddof alone would not change the ranking.
"""

from __future__ import annotations

import itertools

import numpy as np

from raypipe.scores.trajectory import Trajectory, need_epochs, sliding

VARIANTS = ("official", "paper", "extrapolation")


def score(trajectory: Trajectory, window: int = 10, variant: str = "official") -> np.ndarray:
    """Dynamic Uncertainty, float32 [samples].

    window   J, epochs in a window, at least 2
    variant  official, paper or extrapolation; see the module
    Raises ScoreError when there is no window for so few epochs.
    """
    need_epochs(
        "dynamic-uncertainty",
        trajectory.epochs,
        _least(window, variant),
        f"window {window}, variant {variant}",
    )
    first = 2 if variant == "extrapolation" else 0
    last = trajectory.epochs - window + (0 if variant == "official" else 1)
    freedom = window if variant == "extrapolation" else window - 1
    total = np.zeros(len(trajectory.label))
    for _, squares in itertools.islice(sliding(trajectory.own, window), first, last):
        total += np.sqrt(squares / freedom)
    return (total / (last - first)).astype(np.float32)


def _least(window: int, variant: str) -> int:
    return window + {"official": 1, "paper": 0, "extrapolation": 2}[variant]
