"""A training for CPUs that a table of hundreds of trainings can afford: a plain network of eight convolutions, at rising resolutions.

Most steps see small images, the last quarter the largest; the learning rate rises and falls in one cycle (Smith and Topin, arXiv 1708.07120).
Rising resolutions are those of Howard's DAWNBench entry. The network has the layout of Jordan's airbench (arXiv 2404.00498), with fewer channels and
without its whitening layer. It is not a network that raypipe scores with, so that lists are not judged by the kind of network that made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEST_BATCH = 500


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes
    ----------
    sizes
        Sides of the images in pixels, one for each equal share of the steps.
    epochs, batch, rate
        Of the training; the rate is the highest one.
    channels
        Of the three blocks.
    """

    sizes: tuple[int, ...] = (20,)
    epochs: int = 12
    batch: int = 64
    rate: float = 0.1
    channels: tuple[int, int, int] = (32, 96, 192)
    weight_decay: float = 5e-4
    smoothing: float = 0.1
    warm_up: float = 0.2

    def steps(self, samples: int) -> int:
        return self.epochs * -(-samples // self.batch)


def network(channels: Sequence[int], classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for width in channels:
        layers += [
            nn.Conv2d(before, width, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU(),
        ]  # fmt: skip
        before = width
    return nn.Sequential(
        *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(before, classes)
    ).to(memory_format=torch.channels_last)


class Pixels:
    """Images at several sizes, normalised: each size is computed once."""

    def __init__(self, pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
        """uint8 [n, 3, size, size]; mean and std [3], of pixels from 0 to 1."""
        self._whole = (torch.from_numpy(pixels).float() / 255 - _column(mean)) / _column(std)
        self._sizes: dict[int, Tensor] = {self._whole.shape[-1]: self._whole}

    def at(self, size: int) -> Tensor:
        if size not in self._sizes:
            self._sizes[size] = F.interpolate(
                self._whole, size=(size, size), mode="bilinear", antialias=True
            )
        return self._sizes[size]


def fit(
    recipe: Recipe, pixels: Pixels, labels: np.ndarray, rows: np.ndarray, classes: int, seed: int,
    steps: int | None = None,
) -> nn.Module:  # fmt: skip
    """Train a fresh network on some rows; steps: of the whole training, default those of the recipe's epochs."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = network(recipe.channels, classes).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )  # fmt: skip
    total = recipe.steps(len(rows)) if steps is None else steps
    label = torch.from_numpy(labels)
    left = np.empty(0, np.int64)
    for step in range(total):
        if not len(left):
            left = random.permutation(rows)
        batch, left = left[: recipe.batch], left[recipe.batch :]
        size = recipe.sizes[step * len(recipe.sizes) // total]
        images = augment(pixels.at(size)[batch], random)
        share = step / total
        rate = (
            share / recipe.warm_up if share < recipe.warm_up else (1 - share) / (1 - recipe.warm_up)
        )
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate
        loss = F.cross_entropy(model(images), label[batch], label_smoothing=recipe.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def augment(images: Tensor, random: np.random.Generator) -> Tensor:
    """Flip half of the images, and move all by up to an eighth of their side."""
    size = images.shape[-1]
    flipped = torch.from_numpy(random.random(len(images)) < 0.5)
    images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    reach = max(1, size // 8)
    down, right = random.integers(0, 2 * reach + 1, 2)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return padded[:, :, down : down + size, right : right + size].contiguous(
        memory_format=torch.channels_last
    )


def predictions(model: nn.Module, recipe: Recipe, pixels: Pixels) -> np.ndarray:
    """Predicted class of every image and its mirror image, at the last size: int64 [n]."""
    images = pixels.at(recipe.sizes[-1])
    found = []
    with torch.inference_mode():
        for part in images.split(TEST_BATCH):
            part = part.contiguous(memory_format=torch.channels_last)
            found.append((model(part) + model(part.flip(3))).argmax(1))
    return torch.cat(found).numpy()


def _column(values: np.ndarray) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
