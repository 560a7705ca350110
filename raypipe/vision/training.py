"""The mathematics of training a proxy: batch order, augmentation, learning rate, saved state.

Every random draw derives from (seed, epoch, step), and every batch is defined over the whole seed
set. So a training that was interrupted, or that runs on another number of workers, sees the same
batches and the same augmentation. No Ray, no storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raypipe.config import ProxySettings
from raypipe.vision.optimizers import plain

FINAL_LR_SHARE = 1e-3
"""The learning rate ends at this share of its peak (the published MoSo code: 1e-4 of 0.1)."""
WARM_UP_SHARE = 0.2
"""Share of the steps in which `onecycle` rises linearly to its peak."""


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Return the number of batches in an epoch: nearly equal in size, and none is dropped."""
    return max(1, math.ceil(samples / batch_size))


def learning_rate(settings: ProxySettings, step: int, steps: int) -> float:
    """Return the learning rate of optimiser step `step` (0-based) of `steps`."""
    if settings.schedule == "constant":
        return settings.lr
    warm = int(WARM_UP_SHARE * steps) if settings.schedule == "onecycle" else 0
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, steps - 1 - warm)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def epoch_batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the rows of every batch of an epoch, the same on every worker."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(samples)
    return np.array_split(order, steps_per_epoch(samples, batch_size))


def augment(
    images: np.ndarray, settings: ProxySettings, epoch: int, step: int, part: slice
) -> np.ndarray:
    """Apply random flips and shifts, drawn for the whole batch, to one worker's part of it.

    Parameters
    ----------
    images : np.ndarray
        The whole batch, uint8 [n, 3, size, size].
    settings : ProxySettings
        Seed, flip and crop_padding.
    epoch, step : int
        Together with the seed they determine the draws.
    part : slice
        This worker's samples.

    Returns
    -------
    np.ndarray
        The augmented images[part].
    """
    count, size = len(images), images.shape[-1]
    random = np.random.default_rng([settings.seed, epoch, 1 + step])
    flips = random.random(count) < 0.5
    shifts = random.integers(-settings.crop_padding, settings.crop_padding + 1, (count, 2))
    images, flips, shifts = images[part], flips[part], shifts[part]
    if settings.flip:
        images = np.where(flips[:, None, None, None], images[..., ::-1], images)
    if settings.crop_padding:
        # shift the index and reflect it at the border
        base = np.arange(size)
        rows = _reflect(base[None] + shifts[:, :1], size)
        columns = _reflect(base[None] + shifts[:, 1:], size)
        images = np.take_along_axis(images, rows[:, None, :, None], 2)
        images = np.take_along_axis(images, columns[:, None, None, :], 3)
    return np.ascontiguousarray(images)


def shrink(images: Tensor, size: int) -> Tensor:
    """Return images with a side of `size` pixels, antialiased bilinear, uint8 [n, c, size, size].

    `images` are uint8 and square, and not smaller.
    """
    if images.shape[-1] == size:
        return images
    smaller = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).to(torch.uint8)


def _reflect(index: np.ndarray, size: int) -> np.ndarray:
    period = max(1, 2 * (size - 1))
    index = np.abs(index) % period
    return np.where(index >= size, period - index, index)


def make_optimizer(settings: ProxySettings, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of the settings for all parameters of the model."""
    if settings.optimizer == "adamw":
        return plain(torch.optim.AdamW)(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
    return plain(torch.optim.SGD)(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state needed to resume training, as flat tensors.

    Weights are named `model.NAME`, optimiser state `optimizer.SLOT.INDEX`.
    """
    state = {
        f"model.{name}": value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if value is not None:
                state[f"optimizer.{slot}.{index}"] = (
                    torch.as_tensor(value).detach().cpu().contiguous()
                )
    return state


def restore_training(
    state: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load the result of `training_state` into a model and its optimiser."""
    model.load_state_dict(
        {
            name.removeprefix("model."): value
            for name, value in state.items()
            if name.startswith("model.")
        }
    )
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in _optimizer_slots(state):
        slot, _, index = name.rpartition(".")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict(
        {"state": slots, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _optimizer_slots(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return (
        (name.removeprefix("optimizer."), value)
        for name, value in state.items()
        if name.startswith("optimizer.")
    )
