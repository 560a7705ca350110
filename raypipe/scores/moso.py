"""MoSo, Moving-one-Sample-out: how well a sample's gradient aligns with the mean gradient.

Source: Tan et al., "Data Pruning via Moving-one-Sample-out", NeurIPS 2023 (arXiv 2310.14664), Eq. 4:

    M(z) = E_{t ~ U{1..T}} [ (T/N) * eta_t * < grad L(S\\z, w_t), grad l(z, w_t) > ]

T is the number of optimiser steps, N the size of the seed set S (or, with `proxy.parts`, of the part that is S then), eta_t the
learning rate in force at checkpoint t. The expectation is taken over the kept checkpoints. Higher means keep: taking the sample
away would raise the loss of the rest.

How it is computed. With G_t = grad L(S, w_t), the number < G_t, grad l_i > is the derivative of l_i along G_t. One
forward-mode pass (`torch.func.jvp` of the vector of per-sample losses, tangent G_t) gives it for a whole batch, exact to
rounding, without any per-sample gradient in memory; `raypipe.scores.forward_mode` does the same faster. The network is in eval
mode, so that samples do not mix in BatchNorm, and images are not augmented (the published code scores augmented crops, which
differ between its two passes).

G_t includes the sample itself. Taking it out subtracts |grad l_i|^2 / N; `without_itself` does that, with the lengths from
`raypipe.scores.per_sample`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

Parameters = dict[str, Tensor]


def parameters_of(model: nn.Module) -> Parameters:
    """The weights a MoSo gradient is taken over: all trainable ones, detached."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def gradient_sum(model: nn.Module, images: Tensor, labels: Tensor) -> Parameters:
    """Sum over a batch of the gradients of the cross-entropy.

    images  input of the model [n, ...];  labels  int64 [n]
    Returns tensors shaped like the parameters. Divide the sum over all batches by N to get G_t.
    """
    model.eval()
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(named.items(), gradients, strict=True)
    }


def length_of(direction: Mapping[str, Tensor]) -> float:
    """|direction|. Raises FloatingPointError when it is not finite."""
    squares = torch.stack([value.double().square().sum() for value in direction.values()])
    length = float(squares.sum().sqrt())
    if not math.isfinite(length):
        raise FloatingPointError(
            "the mean gradient is not finite; the proxy's training diverged (lower proxy.lr)"
        )
    return length


def alignments(
    model: nn.Module, direction: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> Tensor:
    """< direction, grad l_i > for every sample of a batch: [n].

    direction  tensors shaped like the parameters, usually the mean gradient G_t
    """
    model.eval()
    parameters = parameters_of(model)
    length = length_of(direction)
    if length == 0:
        return torch.zeros(
            len(images), dtype=next(iter(parameters.values())).dtype, device=images.device
        )
    # A tangent of unit length keeps its own scale from meeting the limits of low precision.
    tangent = {
        name: (direction[name] / length).to(value.dtype) for name, value in parameters.items()
    }

    def losses(weights: Parameters) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (images,)), labels, reduction="none")

    with torch.no_grad():
        return jvp(losses, (parameters,), (tangent,))[1] * length


def combine(
    aligned: np.ndarray,
    learning_rates: np.ndarray,
    weights: str,
    *,
    steps: int,
    samples: int,
    spread: np.ndarray | None = None,
) -> np.ndarray:
    """MoSo from the alignments at every checkpoint: float32 [n].

    aligned         [n, checkpoints]
    learning_rates  [checkpoints], eta_t
    weights         lr: Eq. 4; none: eta_t = 1; normalized: every checkpoint divided by its `spread`, then averaged
    steps, samples  T and N of Eq. 4
    spread          [checkpoints], standard deviation of the alignments over the whole seed set; for `normalized` only
    """
    if weights == "normalized":
        if spread is None:
            raise ValueError(
                "weights 'normalized' needs the spread of the alignments over the seed set"
            )
        factor = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0)
    elif weights == "lr":
        factor = learning_rates * steps / samples
    elif weights == "none":
        factor = np.full(aligned.shape[1], steps / samples)
    else:
        raise ValueError(f"weights {weights!r} is not lr, none or normalized")
    return (aligned.astype(np.float64) @ (factor / aligned.shape[1])).astype(np.float32)


def joining(
    aligned: np.ndarray, squares: np.ndarray, samples: int, mean_square: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Alignments and |G'|^2 after each sample, one at a time, has joined the N = `samples` others: G' = (N G + g) / (N + 1).

    aligned      < G, g >, G the mean over the others;  squares  |g|^2;  both [n, checkpoints];  mean_square  |G|^2, [checkpoints]
    Returns < G', g > and |G'|^2, float64 [n, checkpoints]. Taken out again by `without_itself` (formula paper, N + 1 samples),
    such a sample has the alignment < G, g > that it came with; formula code scores it as one of N + 1.
    """
    n = float(samples)
    inside = (n * aligned + squares) / (n + 1)
    return inside, (n**2 * mean_square + 2 * n * aligned + squares) / (n + 1) ** 2


def without_itself(
    aligned: np.ndarray,
    squares: np.ndarray,
    samples: int,
    formula: str = "paper",
    mean_square: np.ndarray | None = None,
) -> np.ndarray:
    """Alignments with the sample taken out of the mean gradient, float64 [n, checkpoints].

    aligned      < G, g_i >, G the mean over all `samples` N;  squares  |g_i|^2;  both [n, checkpoints]
    formula      paper: < G_-i, g_i > = N/(N-1) (< G, g_i > - |g_i|^2 / N), with the mean over the others, as Eq. 4 says
                 code: what the published code computes ("MoSo_scoring_exact"), with S = < G - g_i/N, g_i >:
                 (2N-3)/(N-1)^2 |G|^2 - |g_i|^2/(N-1)^2 + (2N-4)/(N-1)^2 S
    mean_square  |G|^2, [checkpoints] or [n, checkpoints], for formula code
    """
    n = float(samples)
    rest = aligned - squares / n
    if formula == "paper":
        return rest * (n / (n - 1))
    if mean_square is None:
        raise ValueError("formula 'code' needs |G|^2")
    return (
        (2 * n - 3) / (n - 1) ** 2 * mean_square
        - squares / (n - 1) ** 2
        + (2 * n - 4) / (n - 1) ** 2 * rest
    )
