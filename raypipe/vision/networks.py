"""Proxies: torchvision networks with a stem for small images, and one small network.

A `Proxy` is a backbone that gives an embedding and a linear head that gives logits; pixels go in as uint8 and are
normalised inside, so that every caller treats them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from raypipe.config.choices import PROXY_MODELS
from raypipe.errors import ConfigError


class ProxyNet(nn.Module):
    """Image classifier in two parts.

    backbone       float [n, 3, size, size] -> embedding [n, d]
    head           embedding [n, d] -> logits [n, classes]
    mean, std      per channel, of pixels scaled to 0..1
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
        """uint8 [n, 3, size, size] -> float [n, d]."""
        scaled = pixels.to(self.mean.dtype).div(255)
        return self.backbone((scaled - self.mean) / self.std)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [n, 3, size, size] -> logits [n, classes]."""
        return self.head(self.embed(pixels))


def build(
    name: str,
    classes: int,
    image_size: int,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
) -> ProxyNet:
    """A proxy with fresh weights from torch's global generator.

    Raises ConfigError for an unknown name.
    """
    if name == "small":
        return ProxyNet(_small(24), 96, classes, mean, std)
    if name not in PROXY_MODELS:
        raise ConfigError(f"proxy.model: {name!r} is not one of {', '.join(PROXY_MODELS)}")
    import torchvision  # takes as long to import as torch itself; the small network does without

    network = torchvision.models.get_model(name, weights=None)
    width = network.fc.in_features
    network.fc = nn.Identity()
    _adapt_stem(network, image_size)
    return ProxyNet(network, width, classes, mean, std)


def _adapt_stem(network: nn.Module, image_size: int) -> None:
    """A stem made for 224 pixels would leave 1x1 maps of a small image: below 128 pixels the pooling goes, below 48 the stride too."""
    if image_size >= 128:
        return
    stride = 1 if image_size < 48 else 2
    channels = cast(nn.Conv2d, network.conv1).out_channels
    network.conv1 = nn.Conv2d(3, channels, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


class _Block(nn.Module):
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


def _small(width: int) -> nn.Module:
    """A residual network of 0.3 M parameters for small images: three blocks of `width`, 2 and 4 times `width` channels."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Block(width, width, 1),
        _Block(width, 2 * width, 2),
        _Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
