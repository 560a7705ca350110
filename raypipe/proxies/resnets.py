"""ResNets of torchvision with a stem for small images, and one small residual network."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from raypipe.proxies.network import Network


def resnet(name: str) -> Network:
    """Return one of `raypipe.config.choices.PROXY_MODELS`."""

    def make(classes: int, image_size: int, channels: int) -> nn.Module:
        if name == "small":
            return _small_resnet(24, classes, channels)
        import torchvision  # slow to import (as slow as torch) and not needed for `small`

        network = torchvision.models.get_model(name, weights=None)
        _adapt_stem(network, image_size, channels)
        network.fc = nn.Linear(network.fc.in_features, classes)
        return network

    if name == "small":
        return Network(name, make, head="head")
    from raypipe.proxies import torchvision_networks

    return replace(torchvision_networks.network(name, name), make=make, head="fc")


def _adapt_stem(network: nn.Module, image_size: int, channels: int) -> None:
    """Remove downsampling for small images: a stem for 224 pixels would leave 1x1 maps.

    Below 128 pixels the pooling is removed, below 48 pixels the stride as well.
    """
    width = cast(nn.Conv2d, network.conv1).out_channels
    if image_size >= 128:
        if channels != 3:
            network.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        return
    stride = 1 if image_size < 48 else 2
    network.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
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


def _small_resnet(width: int, classes: int, channels: int) -> nn.Module:
    """Return a residual network for small images.

    Three blocks have `width`, 2 `width` and 4 `width` channels.

    With `width` 24 it has 0.3 M parameters.
    """
    network = nn.Sequential(
        nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _ResidualBlock(width, width, 1),
        _ResidualBlock(width, 2 * width, 2),
        _ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    network.add_module("head", nn.Linear(4 * width, classes))
    return network
