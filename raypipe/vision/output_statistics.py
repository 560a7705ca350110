"""Statistics of the proxy's output for each sample, from one forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def output_statistics(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Return loss, margin, distance and entropy of every sample.

    Parameters
    ----------
    logits : Tensor
        Float [n, classes] with at least two classes.
    label : Tensor
        Int64 [n].

    Returns
    -------
    dict[str, Tensor]
        By name, [n] each, in the order of `raypipe.scores.trajectory.STATISTICS`. They are
        defined in `raypipe.scores.trajectory.Trajectory`.
    """
    column = label[:, None]
    probabilities = logits.softmax(1)
    return {
        "loss": F.cross_entropy(logits, label, reduction="none"),
        "margin": (
            logits.gather(1, column) - logits.scatter(1, column, -torch.inf).amax(1, keepdim=True)
        )[:, 0],
        "distance": probabilities.scatter_add(
            1, column, torch.full_like(column, -1.0, dtype=logits.dtype)
        ).norm(dim=1),
        "entropy": torch.special.entr(probabilities).sum(1),
    }
