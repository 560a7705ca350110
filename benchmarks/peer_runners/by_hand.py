"""Alignments with PyTorch alone: loops, `torch.func.vmap(grad)` and `torch.func.jvp`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from given import Given
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap


def loop(given: Given, batch: int) -> Tensor:
    """One backward pass an image, and the product with the vector parameter by parameter."""
    named = dict(given.network.named_parameters())
    rows = []
    for row in range(len(given.images)):
        logits = given.network(given.images[row : row + 1])
        loss = F.cross_entropy(logits, given.labels[row : row + 1])
        own = torch.autograd.grad(loss, list(named.values()))
        rows.append(
            sum((given.vector[name] * value).sum() for name, value in zip(named, own, strict=True))
        )
    return torch.stack(rows)


def moso(given: Given, batch: int) -> Tensor:
    """The published MoSo code's way: `MoSo_scoring_exact` of hrtan/MoSo, scoring.py.

    It scores an image at a time with three products over all parameters in one vector. The score is
    solved for the alignment.
    """
    parameters, n = list(given.network.parameters()), 10_000
    mean = torch.cat([given.vector[name].flatten() for name, _ in given.network.named_parameters()])
    rows = []
    for row in range(len(given.images)):
        logits = given.network(given.images[row : row + 1])
        loss = F.cross_entropy(logits, given.labels[row : row + 1])
        own = nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters)).detach()
        square = (own * own).sum()
        first, third = (2 * n - 3) / (n - 1) ** 2 * (mean * mean).sum(), (2 * n - 4) / (n - 1) ** 2
        score = first - square / (n - 1) ** 2 + third * ((mean - 1 / n * own) * own).sum()
        rows.append((score - first + square / (n - 1) ** 2) / third + square / n)
    return torch.stack(rows)


def vmap_grad(given: Given, batch: int) -> Tensor:
    weights = {name: value.detach() for name, value in given.network.named_parameters()}
    buffers = dict(given.network.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(given.network, {**parameters, **buffers}, (image[None],))
        return F.cross_entropy(logits, label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    rows = []
    for images, labels in zip(given.images.split(batch), given.labels.split(batch), strict=True):
        own = per_sample(weights, images, labels)
        rows.append(
            sum(value.flatten(1) @ given.vector[name].flatten() for name, value in own.items())
        )
    return torch.cat(rows)


def forward_mode(given: Given, batch: int) -> Tensor:
    weights = {name: value.detach() for name, value in given.network.named_parameters()}
    rows = []
    for images, labels in zip(given.images.split(batch), given.labels.split(batch), strict=True):

        def losses(parameters: dict[str, Tensor]) -> Tensor:
            logits = functional_call(given.network, parameters, (images,))
            return F.cross_entropy(logits, labels, reduction="none")

        with torch.no_grad():
            rows.append(jvp(losses, (weights,), (given.vector,))[1])
    return torch.cat(rows)
