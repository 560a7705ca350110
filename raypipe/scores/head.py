"""Gradients of the last layer alone, in closed form: one forward pass and no differentiation.

With embedding h, logits W h + b and probabilities p, the gradient of the cross-entropy is (p - y)
h' for W and p - y for b, so

    < G, g_i > = (p_i - y_i)' (G_W h_i + G_b),        |g_i|^2 = |p_i - y_i|^2 (|h_i|^2 + 1)

MoSo and GraNd over the last layer are then as cheap as the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raypipe.proxies.networks import ProxyNet

WEIGHT, BIAS = "head.weight", "head.bias"


def error_and_embedding(model: ProxyNet, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the error p - y, [n, classes], and the embedding, [n, d], of a batch.

    The model is put into eval mode.
    """
    model.eval()
    with torch.no_grad():
        embedding = model.embed(images)
        error = model.head(embedding).softmax(1)
        error[torch.arange(len(labels), device=error.device), labels] -= 1
    return error, embedding


def head_gradient_sum(model: ProxyNet, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the sum over a batch of the last layer's gradients, by parameter name."""
    error, embedding = error_and_embedding(model, images, labels)
    return {WEIGHT: error.T @ embedding, BIAS: error.sum(0)}


def head_norms_and_alignments(
    model: ProxyNet, images: Tensor, labels: Tensor, direction: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return squared gradient norms and alignments over the last layer.

    Parameters
    ----------
    model : ProxyNet
        Put into eval mode.
    images : Tensor
        uint8 [n, 3, size, size].
    labels : Tensor
        int64 [n].
    direction : Mapping[str, Tensor], optional
        Must have `WEIGHT` and `BIAS`. None: the alignments are 0.

    Returns
    -------
    squares, alignments : Tensor
        |g_i|^2 and < direction, g_i >, [n] each.
    """
    error, embedding = error_and_embedding(model, images, labels)
    square = error.square().sum(1) * (embedding.square().sum(1) + 1)
    if direction is None:
        return square, torch.zeros_like(square)
    return square, (
        error * (embedding @ direction[WEIGHT].T.to(error.dtype) + direction[BIAS].to(error.dtype))
    ).sum(1)
