r"""MoSo, Moving-one-Sample-out: how well a sample's gradient aligns with the mean gradient.

Eq. 4 of the paper:

    M(z) = E_{t ~ U{1..T}} [ (T/N) * eta_t * < grad L(S\z, w_t), grad l(z, w_t) > ]

T is the number of optimiser steps, N the size of the seed set S (with `proxy.parts`, of the part
that takes its place), and eta_t the learning rate at checkpoint t. The expectation is over the
saved checkpoints. Higher means keep: removing the sample would raise the loss of the rest.

How it is computed. With G_t = grad L(S, w_t), the number < G_t, grad l_i > is the derivative of
l_i along G_t. One forward-mode pass (`torch.func.jvp` of the vector of per-sample losses, tangent
G_t) yields it for a whole batch. This is exact up to rounding and keeps no per-sample gradient in
memory. `raypipe.scores.forward_mode` does the same faster. The network is in eval mode, so that
samples do not mix in BatchNorm, and images are not augmented. (The published code scores
augmented crops, which differ between its two passes.)

G_t includes the sample itself. Removing it subtracts |grad l_i|^2 / N; `leave_one_out` does that,
with the norms from `raypipe.scores.per_sample`.

References
----------
Tan et al., "Data Pruning via Moving-one-Sample-out", NeurIPS 2023 (arXiv 2310.14664).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from raypipe.scores.attention import mathematical_attention

# torch's rules for forward mode, which it compiles at their first use
warnings.filterwarnings("ignore", r"`torch\.jit\.script`", FutureWarning)

Parameters = dict[str, Tensor]


def parameters_of(model: nn.Module) -> Parameters:
    """Return the weights a MoSo gradient is taken over: all trainable ones, detached."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def gradient_sum(model: nn.Module, images: Tensor, labels: Tensor) -> Parameters:
    """Return the sum over a batch of the gradients of the cross-entropy.

    Divide the sum over all batches by N to get G_t.

    Parameters
    ----------
    model : nn.Module
        Put into eval mode.
    images : Tensor
        Input of the model, [n, ...].
    labels : Tensor
        int64 [n].

    Returns
    -------
    dict[str, Tensor]
        Tensors shaped like the trainable parameters.
    """
    model.eval()
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(named.items(), gradients, strict=True)
    }


def norm_of(direction: Mapping[str, Tensor]) -> float:
    """Return |direction|; raise FloatingPointError if it is not finite."""
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
    """Return < direction, grad l_i > for every sample of a batch, [n].

    Parameters
    ----------
    model : nn.Module
        Put into eval mode.
    direction : Mapping[str, Tensor]
        Tensors shaped like the parameters, usually the mean gradient G_t.
    images : Tensor
        Input of the model, [n, ...].
    labels : Tensor
        int64 [n].

    Raises
    ------
    FloatingPointError
        If the direction is not finite.
    """
    model.eval()
    parameters = parameters_of(model)
    length = norm_of(direction)
    if length == 0:
        return torch.zeros(
            len(images), dtype=next(iter(parameters.values())).dtype, device=images.device
        )
    # A tangent of unit length avoids overflow and underflow in low precision.
    tangent = {
        name: (direction[name] / length).to(value.dtype) for name, value in parameters.items()
    }

    def losses(weights: Parameters) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (images,)), labels, reduction="none")

    with torch.no_grad(), mathematical_attention():
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
    """Return MoSo from the alignments at every checkpoint, float32 [n].

    Parameters
    ----------
    aligned : np.ndarray
        Alignments, [n, checkpoints].
    learning_rates : np.ndarray
        eta_t, [checkpoints].
    weights : {"late", "lr", "none", "normalized"}
        lr: Eq. 4. none: eta_t = 1. normalized: divide every checkpoint by its `spread`, then
        average. late: the same over the second half of the checkpoints.
    steps, samples : int
        T and N of Eq. 4.
    spread : np.ndarray, optional
        Standard deviation of the alignments over the whole seed set, [checkpoints]. Required for
        "normalized" and "late", otherwise unused.

    Raises
    ------
    ValueError
        If `weights` is unknown, or `spread` is missing.
    """
    count = aligned.shape[1]
    if weights in ("normalized", "late"):
        if spread is None:
            raise ValueError(
                f"weights {weights!r} requires the spread of the alignments over the seed set"
            )
        factor = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0)
        if weights == "late":
            first = count // 2
            factor[:first], count = 0, count - first
    elif weights == "lr":
        factor = learning_rates * steps / samples
    elif weights == "none":
        factor = np.full(count, steps / samples)
    else:
        raise ValueError(f"weights {weights!r} is not one of late, lr, none, normalized")
    return (aligned.astype(np.float64) @ (factor / count)).astype(np.float32)


def add_one_in(
    aligned: np.ndarray, squares: np.ndarray, samples: int, mean_square: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return alignments and |G'|^2 after each sample, one at a time, has joined N others.

    The mean gradient becomes G' = (N G + g) / (N + 1).

    Parameters
    ----------
    aligned : np.ndarray
        < G, g >, where G is the mean over the N others, [n, checkpoints].
    squares : np.ndarray
        |g|^2, [n, checkpoints].
    samples : int
        N.
    mean_square : np.ndarray
        |G|^2, [checkpoints].

    Returns
    -------
    aligned, mean_square : np.ndarray
        < G', g > and |G'|^2, float64 [n, checkpoints].

    Notes
    -----
    `leave_one_out` with formula "paper" and N + 1 samples removes the sample again and returns the
    alignment < G, g > it started from. Formula "code" scores it as one of N + 1.
    """
    n = float(samples)
    inside = (n * aligned + squares) / (n + 1)
    return inside, (n**2 * mean_square + 2 * n * aligned + squares) / (n + 1) ** 2


def leave_one_out(
    aligned: np.ndarray,
    squares: np.ndarray,
    samples: int,
    formula: str = "paper",
    mean_square: np.ndarray | None = None,
) -> np.ndarray:
    """Return alignments with the mean gradient of the other samples, float64 [n, checkpoints].

    Parameters
    ----------
    aligned : np.ndarray
        < G, g_i >, where G is the mean over all N samples, [n, checkpoints].
    squares : np.ndarray
        |g_i|^2, [n, checkpoints].
    samples : int
        N.
    formula : {"paper", "code"}
        See below.
    mean_square : np.ndarray, optional
        |G|^2, [checkpoints] or [n, checkpoints]. Required for "code".

    Notes
    -----
    paper: the mean over the others, as in Eq. 4,

        < G_-i, g_i > = N/(N-1) (< G, g_i > - |g_i|^2 / N)

    code: what the published code computes ("MoSo_scoring_exact"), with S = < G - g_i/N, g_i >,

        (2N-3)/(N-1)^2 |G|^2 - |g_i|^2/(N-1)^2 + (2N-4)/(N-1)^2 S
    """
    n = float(samples)
    rest = aligned - squares / n
    if formula == "paper":
        return rest * (n / (n - 1))
    if mean_square is None:
        raise ValueError("formula 'code' requires mean_square, |G|^2")
    return (
        (2 * n - 3) / (n - 1) ** 2 * mean_square
        - squares / (n - 1) ** 2
        + (2 * n - 4) / (n - 1) ** 2 * rest
    )
