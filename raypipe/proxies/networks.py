"""The proxy: a backbone, which computes an embedding, and a linear head, which computes logits.

Pixels go in as uint8 and are normalised inside, so every caller treats all networks alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raypipe.config import ProxySettings
from raypipe.proxies.network import Network
from raypipe.proxies.registry import find
from raypipe.proxies.split import split_head
from raypipe.proxies.weights import load_weights

NORMALISATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers that `proxy.freeze: norm` leaves as they are; BatchNorm is a `_NormBase`."""


class ProxyNet(nn.Module):
    """Image classifier that consists of a backbone and a linear head.

    Parameters
    ----------
    backbone : nn.Module
        Maps float [n, channels, size, size] to embeddings [n, width].
    head : nn.Linear
        Maps embeddings [n, width] to logits [n, classes].
    mean, std : Sequence[float]
        Per channel, for pixels scaled to 0..1.
    head_name : str
        Name of the head in the classifier that the backbone comes from.

    Attributes
    ----------
    backbone : nn.Module
        As above.
    head : nn.Linear
        As above.
    head_name : str
        As above.
    mean, std : Tensor
        Buffers [1, channels, 1, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        mean: Sequence[float],
        std: Sequence[float],
        head_name: str = "head",
    ) -> None:
        super().__init__()
        self.head_name = head_name
        self._freeze = "none"
        self.backbone = backbone
        self.head = head
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def hold(self, freeze: str, train: str) -> ProxyNet:
        """Choose the weights to train, as `proxy.freeze` and `proxy.train` do; return the proxy."""
        self._freeze = freeze
        if freeze == "backbone" or train == "head":
            self.backbone.requires_grad_(False)
        for layer in self.frozen_layers():
            layer.requires_grad_(False)
        return self

    def frozen_layers(self) -> Iterator[nn.Module]:
        """Yield the layers that also keep their statistics in training."""
        for layer in self.backbone.modules():
            if self._freeze == "backbone" or (
                self._freeze == "norm" and isinstance(layer, NORMALISATION)
            ):
                yield layer

    def train(self, mode: bool = True) -> ProxyNet:
        super().train(mode)
        for layer in self.frozen_layers():
            layer.eval()
        return self

    def embed(self, pixels: Tensor) -> Tensor:
        """Map uint8 [n, channels, size, size] to embeddings, float [n, width]."""
        scaled = pixels.to(self.mean.dtype).div(255)
        return self.backbone((scaled - self.mean) / self.std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 [n, channels, size, size] to logits [n, classes]."""
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
        As `proxy.model`; see `raypipe.proxies.registry.find`.
    classes : int
        Number of classes.
    image_size : int
        Side of the images in pixels.
    mean, std : Sequence[float]
        Per channel, for pixels scaled to 0..1.

    Raises
    ------
    ConfigError
        If the name is unknown, or the network cannot be built or split into backbone and head.
    """
    return proxy_of(find(name), classes, image_size, mean, std)


def proxy_of(
    network: Network, classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> ProxyNet:
    """Return a proxy with fresh weights; see `build_network`."""
    module = network.make(classes, image_size, len(mean))
    backbone, head, name = split_head(network, module, classes, image_size, len(mean))
    return ProxyNet(backbone, head, mean, std, name)


def new_proxy(
    settings: ProxySettings,
    classes: int,
    image_size: int,
    statistics: tuple[Sequence[float], Sequence[float]],
    weights: Mapping[str, Tensor] | None = None,
) -> ProxyNet:
    """Return a proxy as a training starts with it.

    Parameters
    ----------
    settings : ProxySettings
        Network, and the weights to train.
    classes, image_size : int
        Number of classes; side of the images in pixels.
    statistics : tuple of Sequence[float]
        Mean and standard deviation per channel, for pixels scaled to 0..1.
    weights : Mapping[str, Tensor], optional
        State dict to start from; None: what torch's global generator draws.

    Raises
    ------
    ConfigError
        As `build_network`, or if the weights are those of another network.
    """
    model = build_network(settings.model, classes, image_size, *statistics)
    if weights is not None:
        load_weights(model, weights, settings)
    return model.hold(settings.freeze, settings.train)
