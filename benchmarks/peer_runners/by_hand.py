"""Alignments with PyTorch alone: loops, `torch.func.vmap(grad)` and `torch.func.jvp`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from given import Given
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from benchmarks.plain_alignments import one_at_a_time, published


def loop(given: Given, batch: int) -> Tensor:
    return one_at_a_time(given.network, given.images, given.labels, given.vector)


def moso(given: Given, batch: int) -> Tensor:
    return published(given.network, given.images, given.labels, given.vector)


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
