"""Networks whose embeddings are used next to the proxy, or in place of its own: `embed.model`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raypipe.config import ProxySettings
from raypipe.config.choices import TIMM_PREFIX, TORCHVISION_PREFIX
from raypipe.errors import ConfigError
from raypipe.plugins import failure, load
from raypipe.proxies.features import Features, load_whole
from raypipe.proxies.networks import new_proxy
from raypipe.proxies.own import called, stated_by
from raypipe.proxies.registry import find

MEAN, STD = 0.5, 0.25
"""Normalisation of each channel for a network that states none."""
CLASSES = 10
"""Classes of the last layer that is removed from a classifier."""
PROBES = 2
"""Random images that a network is tried with."""


class FeatureNetwork(nn.Module):
    """Maps pixels to embeddings.

    Parameters
    ----------
    body : nn.Module
        Maps float [n, channels, size, size] to embeddings [n, width].
    mean, std : Sequence[float]
        Per channel, for pixels scaled to 0..1.
    name : str
        As in `embed.model`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, mean: Sequence[float], std: Sequence[float], name: str
    ) -> None:
        super().__init__()
        self.body = body
        self._name, self._width = name, 0
        for buffer, values in (("mean", mean), ("std", std)):
            channels = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(buffer, channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 [n, channels, size, size] to embeddings, float [n, width].

        Raises
        ------
        ConfigError
            If the network fails, or returns anything else, now or after some images.
        """
        scaled = pixels.to(self.mean.dtype).div(255)
        count, size = len(pixels), pixels.shape[-1]
        try:
            output = self.body((scaled - self.mean) / self.std)
        except torch.OutOfMemoryError:
            raise  # fewer images at a time can fit
        except Exception as error:  # whatever a network's own code raises
            raise ConfigError(
                f"embed.model: {self._name} cannot process images of {size} pixels with "
                f"{pixels.shape[1]} channels ({failure(error)}); set embed.image_size"
            ) from None
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"embed.model: {self._name} returns a {type(output).__name__}; expected a tensor "
                "of embeddings [images, width]"
            )
        width = self._width or "width"
        if (
            output.ndim != 2
            or len(output) != count
            or not output.is_floating_point()
            or self._width not in (0, output.shape[1])
        ):
            raise ConfigError(
                f"embed.model: {self._name} returns {output.dtype} of shape {list(output.shape)} "
                f"for {count} images; expected floats of shape [{count}, {width}]"
            )
        self._width = output.shape[1]
        return output


def find_features(name: str) -> Features:
    """Return the features of a name, as `embed.model`; code of the user's own is imported.

    Raises
    ------
    ConfigError
        If there is no such network, or its library is not installed.
    """
    library, _, rest = name.partition(":")
    if library in (TORCHVISION_PREFIX, TIMM_PREFIX):
        with _messages_about_embed():
            return _of_classifier(name)
    if library == "transformers":
        from raypipe.proxies import transformers_features

        return transformers_features.features(name, rest)
    if library == "open_clip":
        from raypipe.proxies import open_clip_features

        return open_clip_features.features(name, rest)
    return _own(name)


def build_features(
    features: Features, image_size: int, channels: int, weights: str | Mapping[str, Tensor]
) -> FeatureNetwork:
    """Return a network in eval mode, after a trial with random images.

    Raises
    ------
    ConfigError
        If it cannot be built, its weights are those of another network, or its output is not one
        finite embedding for each image.
    """
    mean, std = features.mean, features.std
    if mean is None or std is None or len(mean) != channels:
        mean, std = (MEAN,) * channels, (STD,) * channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = features.build(image_size, channels, weights)
    network = FeatureNetwork(body, mean, std, features.name).eval().requires_grad_(False)
    shape = (PROBES, channels, image_size, image_size)
    images = torch.randint(
        0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    with torch.inference_mode():
        output = network(images)
    if not output.isfinite().all():
        raise ConfigError(
            f"embed.model: {features.name} returns values that are not finite for random images; "
            "check its weights"
        )
    return network


def _of_classifier(name: str) -> Features:
    """Return what a classifier computes before its last layer."""
    network = find(name)

    def build(image_size: int, channels: int, weights: str | Mapping[str, Tensor]) -> nn.Module:
        with _messages_about_embed():
            if weights == "pretrained":
                assert network.pretrained is not None, "torchvision and timm publish weights"
                weights = network.pretrained(image_size)
            given = None if isinstance(weights, str) else weights
            settings = ProxySettings(
                model=name,
                image_size=image_size,
                channels=channels,
                weights="none" if given is None else "the file",
            )
            statistics = ((MEAN,) * channels, (STD,) * channels)
            return new_proxy(settings, CLASSES, image_size, statistics, given).backbone

    return Features(name, build, network.input_size, network.mean, network.std)


def _own(name: str) -> Features:
    """Return the features of `module:function`, which is imported here."""
    function = load(name, "embed.model")
    stated = stated_by("embed.model", name, function)

    def build(image_size: int, channels: int, weights: str | Mapping[str, Tensor]) -> nn.Module:
        given = {"image_size": image_size, "channels": channels}
        module = called("embed.model", name, function, given)
        if not isinstance(weights, str):
            load_whole(module, weights, name)
        return module

    return Features(
        name,
        build,
        input_size=stated["input_size"][-1] if "input_size" in stated else None,
        mean=tuple(stated["mean"]) if "mean" in stated else None,
        std=tuple(stated["std"]) if "std" in stated else None,
    )


@contextmanager
def _messages_about_embed() -> Iterator[None]:
    """Let errors about the proxy's network name the settings of `embed` instead."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for name in ("model", "weights", "image_size"):
            text = text.replace(f"proxy.{name}", f"embed.{name}")
        raise ConfigError(text) from None
