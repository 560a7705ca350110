"""Where a proxy's network comes from, as far as the rest of the package needs to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

CHANNELS = 3
"""Channels of an image."""


@dataclass(frozen=True)
class Network:
    """A network that a proxy can be.

    Attributes
    ----------
    name : str
        As in `proxy.model`.
    make : callable
        (classes, image_size, channels) -> classifier with fresh weights, which maps float
        [n, channels, size, size] to logits [n, classes].
    head : str, optional
        Name of the classifier's last layer, an `nn.Linear`. None: it is looked up.
    input_size : int, optional
        Side of the images, in pixels, that the network is made for; None if it states none.
    mean, std : tuple of float, optional
        Normalisation of the images that it is made for, per channel; None if it states none.
    pretrained : callable, optional
        image_size -> the state dict that the network's library publishes; None without one.
    """

    name: str
    make: Callable[[int, int, int], nn.Module]
    head: str | None = None
    input_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pretrained: Callable[[int], Mapping[str, Tensor]] | None = None
