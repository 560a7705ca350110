"""Alignments of gradients with a direction, by loops over images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def one_at_a_time(
    model: nn.Module, images: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    """One backward pass an image, and the product with the direction parameter by parameter."""
    named = dict(model.named_parameters())
    rows = []
    for index in range(len(images)):
        loss = F.cross_entropy(model(images[index : index + 1]), labels[index : index + 1])
        gradients = torch.autograd.grad(loss, list(named.values()))
        rows.append(
            sum(
                (direction[name] * value).sum()
                for name, value in zip(named, gradients, strict=True)
            )
        )
    return torch.stack(rows)


def published(
    model: nn.Module, images: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    """The published MoSo code's way: `MoSo_scoring_exact` of hrtan/MoSo, scoring.py.

    It scores an image at a time with three products over all parameters in one vector. The score is
    solved for the alignment.
    """
    parameters, n = list(model.parameters()), 10_000
    mean = torch.cat([direction[name].flatten() for name, _ in model.named_parameters()])
    rows = []
    for index in range(len(images)):
        loss = F.cross_entropy(model(images[index : index + 1]), labels[index : index + 1])
        own = nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters)).detach()
        square = (own * own).sum()
        first, third = (2 * n - 3) / (n - 1) ** 2 * (mean * mean).sum(), (2 * n - 4) / (n - 1) ** 2
        score = first - square / (n - 1) ** 2 + third * ((mean - 1 / n * own) * own).sum()
        rows.append((score - first + square / (n - 1) ** 2) / third + square / n)
    return torch.stack(rows)
