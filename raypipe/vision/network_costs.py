"""Multiply-adds of the networks, and what a training costs by them.

Imports no torch, except for a network that is not in the table.

Measured on one core of an x86-64 server (AMD EPYC, torch 2.15, float32).
"""

from __future__ import annotations

from raypipe.config.choices import is_own

MACS_PER_PIXEL = {
    "small": 27_150,
    "resnet18": 542_400,
    "resnet34": 1_132_200,
    "resnet50": 1_267_400,
    "resnet101": 2_451_100,
    "wide_resnet50_2": 3_598_000,
    "resnext50_32x4d": 1_312_500,
}
"""Multiply-adds of a forward pass per pixel of the first feature maps (FlopCounterMode)."""
LIKE_OWN = "resnet18"
"""Network whose size that of the user's own is assumed to be: its code is not run to count."""
CPU_MACS = 60e9
"""Multiply-adds per second of one core in forward passes.

Measured: 44 to 62e9 (small, 8 to 32 pixels), 98 to 101e9 (ResNet-18), 69e9 (ResNet-50).
"""
TRAINING = 3.5
"""Forward passes that a training step is worth: 2.4 to 4.2 over the same networks."""
STEP_SECONDS = 5e-3
"""Per training step, outside the network: augmentation, optimiser."""


def costed_as(model: str) -> str:
    """Return the network whose size is counted for a network."""
    return LIKE_OWN if is_own(model) else model


def macs(model: str, image_size: int) -> float:
    """Return the multiply-adds of a forward pass of a proxy."""
    model = costed_as(model)
    if model not in MACS_PER_PIXEL:
        from raypipe.proxies.sizes import size_of

        return size_of(model, image_size).macs
    if model == "small" or image_size < 48:
        side: float = image_size
    else:
        side = image_size / 2 if image_size < 128 else image_size / 4
    return MACS_PER_PIXEL[model] * side * side


def training_seconds(
    model: str, image_size: int, images: float, steps: float, passes: float = TRAINING
) -> float:
    """Return the processor seconds of a training on one core of that server.

    Parameters
    ----------
    model, image_size
        The network and the side of its images in pixels.
    images
        Images that are trained on, over all epochs.
    steps
        Optimiser steps.
    passes
        Forward passes that a training step is worth.
    """
    return images * passes * macs(model, image_size) / CPU_MACS + steps * STEP_SECONDS
