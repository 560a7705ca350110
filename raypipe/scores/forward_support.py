"""Find out whether a network can be differentiated forward, and which layer prevents it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raypipe.scores.moso import alignments, gradient_sum
from raypipe.text import error_text

TOLERANCE = 0.02
"""Largest relative difference of derivatives in float32 that rounding explains."""


def forward_mode_problem(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Return why alignments of a network cannot be computed in forward mode; "" if they can.

    Parameters
    ----------
    model : nn.Module
        Put into eval mode.
    images, labels : Tensor
        Some input of the model, [n, ...], and int64 [n].
    """
    direction = gradient_sum(model, images, labels)
    running: list[tuple[str, str]] = []

    def enter(name: str) -> Any:
        return lambda layer, inputs: running.append((name, type(layer).__name__))

    def leave(layer: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()

    handles = [
        handle
        for name, layer in model.named_modules()
        for handle in (
            layer.register_forward_pre_hook(enter(name)),
            layer.register_forward_hook(leave),
        )
    ]
    try:
        aligned = alignments(model, direction, images, labels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an operation without a derivative, in code of any kind
        name, kind = running[-1] if running else ("", type(model).__name__)
        layer = f"{name.removeprefix('backbone.') or kind} ({kind})"
        return f"layer {layer}: {error_text(error, 200)}"
    finally:
        for handle in handles:
            handle.remove()
    backward = sum(float(value.double().square().sum()) for value in direction.values())
    forward = float(aligned.double().sum())
    if abs(forward - backward) <= TOLERANCE * max(backward, 1e-12):
        return ""
    return (
        f"the derivative is {forward:.4g} forward and {backward:.4g} backward, so a layer defines "
        "its own"
    )
