"""Gradients of the last layer alone, in closed form: no differentiation, one plain forward pass.

With embedding h, logits W h + b and probabilities p, the gradient of the cross-entropy is (p - y) h' for W and p - y for b, so

    < G, g_i > = (p_i - y_i)' (G_W h_i + G_b),        |g_i|^2 = |p_i - y_i|^2 (|h_i|^2 + 1)

MoSo and GraNd over the last layer are then as cheap as the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raypipe.vision.networks import ProxyNet

WEIGHT, BIAS = "head.weight", "head.bias"


def error_and_embedding(model: ProxyNet, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """p - y, [n, classes], and the embedding, [n, d], of a batch; the model is put into eval mode."""
    model.eval()
    with torch.no_grad():
        embedding = model.embed(images)
        error = model.head(embedding).softmax(1)
        error[torch.arange(len(labels), device=error.device), labels] -= 1
    return error, embedding


def head_gradient_sum(model: ProxyNet, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sum over a batch of the last layer's gradients."""
    error, embedding = error_and_embedding(model, images, labels)
    return {WEIGHT: error.T @ embedding, BIAS: error.sum(0)}


def head_norms_and_alignments(
    model: ProxyNet, images: Tensor, labels: Tensor, direction: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """|g_i|^2 and < direction, g_i > over the last layer: two tensors [n]; the alignments are 0 without a direction."""
    error, embedding = error_and_embedding(model, images, labels)
    square = error.square().sum(1) * (embedding.square().sum(1) + 1)
    if direction is None:
        return square, torch.zeros_like(square)
    return square, (
        error * (embedding @ direction[WEIGHT].T.to(error.dtype) + direction[BIAS].to(error.dtype))
    ).sum(1)
