"""Dynamic Uncertainty: how much the label's probability still changes while the proxy learns.

    U_k(x) = std( p_k(y|x), ..., p_{k+J-1}(y|x) ),      U(x) = mean_k U_k(x),      J = 10

Higher means keep, as in the paper. Implementations differ; the default follows the official code:
sample standard deviation (ddof 1), and all windows except the one that ends at the last epoch.
The code of arXiv 2506.09010 (`variant: extrapolation`) uses the population deviation and skips
the first two epochs, but keeps the last window. `variant: paper` is the paper's mean over all
windows. A constant factor (the official code has 10) or ddof alone would not change the ranking.

References
----------
He et al., "Large-scale Dataset Pruning with Dynamic Uncertainty", CVPR workshops 2024
(arXiv 2306.05175).
"""

from __future__ import annotations

import itertools

import numpy as np

from raypipe.scores.trajectory import Trajectory, require_epochs, sliding_moments

VARIANTS = ("official", "paper", "extrapolation")


def score(trajectory: Trajectory, window: int = 10, variant: str = "official") -> np.ndarray:
    """Return the Dynamic Uncertainty, float32 [samples].

    Parameters
    ----------
    trajectory : Trajectory
        Predictions of the proxy.
    window : int
        J, epochs in a window; at least 2.
    variant : {"official", "paper", "extrapolation"}
        See the module docstring.

    Raises
    ------
    ScoreError
        If there are too few epochs for a window.
    """
    require_epochs(
        "dynamic-uncertainty",
        trajectory.epochs,
        _required_epochs(window, variant),
        f"window {window}, variant {variant}",
    )
    first = 2 if variant == "extrapolation" else 0
    last = trajectory.epochs - window + (0 if variant == "official" else 1)
    degrees_of_freedom = window if variant == "extrapolation" else window - 1
    total = np.zeros(len(trajectory.label))
    for _, squares in itertools.islice(
        sliding_moments(trajectory.label_probability, window), first, last
    ):
        total += np.sqrt(squares / degrees_of_freedom)
    return (total / (last - first)).astype(np.float32)


def _required_epochs(window: int, variant: str) -> int:
    return window + {"official": 1, "paper": 0, "extrapolation": 2}[variant]
