"""Proxy networks: torchvision networks with a stem for small images, and one small network.

A `ProxyNet` consists of a backbone, which computes an embedding, and a linear head, which computes
logits. Pixels go in as uint8 and are normalised inside, so every caller treats them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from raypipe.config.choices import PROXY_MODELS
from raypipe.errors import ConfigError


class ProxyNet(nn.Module):
    """Image classifier that consists of a backbone and a linear head.

    Parameters
    ----------
    backbone : nn.Module
        Maps float [n, 3, size, size] to embeddings [n, width].
    width : int
        Length of an embedding.
    classes : int
        Number of classes.
    mean, std : Sequence[float]
        Per channel, for pixels scaled to 0..1.

    Attributes
    ----------
    backbone : nn.Module
        As above.
    head : nn.Linear
        Maps embeddings [n, width] to logits [n, classes].
    mean, std : Tensor
        Buffers [1, 3, 1, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, classes)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def embed(self, pixels: Tensor) -> Tensor:
        """Map uint8 [n, 3, size, size] to embeddings, float [n, width]."""
        scaled = pixels.to(self.mean.dtype).div(255)
        return self.backbone((scaled - self.mean) / self.std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 [n, 3, size, size] to logits [n, classes]."""
        return self.head(self.embed(pixels))


def build_network(
    name: str,
    classes: int,
    image_size: int,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
) -> ProxyNet:
    """Return a proxy with fresh weights, drawn from torch's global generator.

    Parameters
    ----------
    name : str
        One of `raypipe.config.choices.PROXY_MODELS`.
    classes : int
        Number of classes.
    image_size : int
        Side of the images in pixels; small images get a smaller stem.
    mean, std : Sequence[float]
        Per channel, for pixels scaled to 0..1.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    if name == "small":
        return ProxyNet(_small_resnet(24), 96, classes, mean, std)
    if name not in PROXY_MODELS:
        raise ConfigError(f"proxy.model: {name!r} is not one of {', '.join(PROXY_MODELS)}")
    import torchvision  # slow to import (as slow as torch) and not needed for the small network

    network = torchvision.models.get_model(name, weights=None)
    width = network.fc.in_features
    network.fc = nn.Identity()
    _adapt_stem(network, image_size)
    return ProxyNet(network, width, classes, mean, std)


def _adapt_stem(network: nn.Module, image_size: int) -> None:
    """Remove downsampling for small images: a stem for 224 pixels would leave 1x1 maps.

    Below 128 pixels the pooling is removed, below 48 pixels the stride as well.
    """
    if image_size >= 128:
        return
    stride = 1 if image_size < 48 else 2
    channels = cast(nn.Conv2d, network.conv1).out_channels
    network.conv1 = nn.Conv2d(3, channels, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.skip(x))


def _small_resnet(width: int) -> nn.Module:
    """Return a residual network for small images.

    Three blocks have `width`, 2 `width` and 4 `width` channels.

    With `width` 24 it has 0.3 M parameters.
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _ResidualBlock(width, width, 1),
        _ResidualBlock(width, 2 * width, 2),
        _ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
