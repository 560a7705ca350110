"""What one forward pass says of a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def numbers(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Loss, margin, distance and entropy, [n] each, as `raypipe.scores.trajectory.Trajectory` has them; names in that order.

    logits  float [n, classes], at least two classes
    label   int64 [n]
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
