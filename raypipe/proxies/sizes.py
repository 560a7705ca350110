"""Weights, embedding and multiply-adds of networks, counted without computing if possible."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raypipe.errors import ConfigError
from raypipe.proxies.feature_networks import build_features, find_features
from raypipe.proxies.networks import proxy_of
from raypipe.proxies.registry import find

CLASSES = 10


@dataclass(frozen=True)
class NetworkSize:
    """The size of a network.

    Attributes
    ----------
    parameters : int
        Weights, without those of the last layer.
    width : int
        Length of an embedding.
    macs : float
        Multiply-adds of a forward pass of one image.
    """

    parameters: int
    width: int
    macs: float


@cache
def size_of(name: str, image_size: int) -> NetworkSize:
    """Return the size of a network for images of `image_size` pixels.

    Raises
    ------
    ConfigError
        If there is no such network, or it cannot process such images.
    """
    try:
        return _size_on("meta", name, image_size)
    except ConfigError:  # some networks compute while they are built
        with torch.random.fork_rng(devices=[]):
            return _size_on("cpu", name, image_size)


def _size_on(device: str, name: str, image_size: int) -> NetworkSize:
    with torch.device(device):
        model = proxy_of(find(name), CLASSES, image_size, (0.5,) * 3, (0.25,) * 3).eval()
        image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return NetworkSize(
        parameters=sum(value.numel() for value in model.backbone.parameters()),
        width=model.head.in_features,
        macs=counter.get_total_flops() / 2,
    )


@cache
def size_of_features(name: str, image_size: int, channels: int) -> NetworkSize:
    """Return the size of a network of `embed.model`, which is not the user's own code.

    Raises
    ------
    ConfigError
        If there is no such network, or it cannot process such images.
    """
    features = find_features(name)
    try:
        with torch.device("meta"):
            body = features.build(image_size, channels, "none").eval().requires_grad_(False)
            return _counted(body, torch.zeros(1, channels, image_size, image_size))
    except Exception:  # some networks compute while they are built; real errors occur again
        network = build_features(features, image_size, channels, "none")
        return _counted(network, torch.zeros(1, channels, image_size, image_size))


def _counted(network: nn.Module, image: Tensor) -> NetworkSize:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        embedding = network(image)
    return NetworkSize(
        parameters=sum(value.numel() for value in network.parameters()),
        width=embedding.shape[1],
        macs=counter.get_total_flops() / 2,
    )
