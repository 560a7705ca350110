"""Classifiers of timm (PyTorch Image Models)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.proxies.downloads import from_hub
from raypipe.proxies.library_warnings import no_warnings
from raypipe.proxies.network import CHANNELS, Network
from raypipe.text import error_line


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"proxy.model: networks of timm need the package ({error_line(error)}): "
            "pip install 'raypipe[timm]'"
        ) from None
    return timm


@cache
def names() -> tuple[str, ...]:
    """Return the names of all classifiers. Raises ConfigError if timm is not installed."""
    return tuple(_timm().list_models())


def network(name: str, rest: str) -> Network:
    """Return a classifier: `name` as in `proxy.model`, `rest` as in timm, with or without a tag."""
    timm = _timm()
    published = timm.get_pretrained_cfg(rest)

    def create(image_size: int, channels: int, pretrained: bool, classes: int | None) -> nn.Module:
        options = {} if classes is None else {"num_classes": classes}
        given = {"pretrained": pretrained, "in_chans": channels, **options}
        try:
            return timm.create_model(rest, img_size=image_size, **given)
        except TypeError:  # networks without a fixed size of their input do not take it
            return timm.create_model(rest, **given)

    def make(classes: int, image_size: int, channels: int) -> nn.Module:
        try:
            return create(image_size, channels, False, classes)
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"proxy.model: {name} cannot be built for images of {image_size} pixels "
                f"({error_line(error)}); set proxy.image_size"
            ) from None

    def pretrained(image_size: int) -> Mapping[str, Tensor]:
        if published is None or not published.has_weights:
            raise ConfigError(f"proxy.weights: timm publishes no weights for {name}")
        try:
            with no_warnings(), from_hub():
                return create(image_size, CHANNELS, True, None).state_dict()
        except Exception as error:  # no network, no space, a hub that refuses
            where = (
                f"model.safetensors of https://huggingface.co/{published.hf_hub_id}"
                if published.hf_hub_id
                else f"the state dict of {published.url}, saved as a safetensors file,"
            )
            raise ConfigError(
                f"proxy.weights: the weights of {name} cannot be downloaded ({error_line(error)}); "
                f"without a network, copy {where} to where each node reads it and set "
                "proxy.weights to its path"
            ) from None

    if published is None:
        return Network(name, make, pretrained=pretrained)
    return Network(
        name,
        make,
        input_size=published.input_size[-1],
        mean=tuple(published.mean),
        std=tuple(published.std),
        pretrained=pretrained,
    )
