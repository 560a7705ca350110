"""Classifiers of torchvision, as torchvision builds them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.proxies.network import Network
from raypipe.text import error_line

WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
"""Options of the two networks that have more than one classifier."""
SEVERAL_CLASSIFIERS = ("googlenet", "inception_v3")


@cache
def names() -> tuple[str, ...]:
    """Return the names of all classifiers."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def network(name: str, rest: str) -> Network:
    """Return a classifier: `name` as in `proxy.model`, `rest` as in torchvision."""
    published: Any = torchvision.models.get_model_weights(rest).DEFAULT
    preset = published.transforms()

    def make(classes: int, image_size: int, channels: int) -> nn.Module:
        if channels != 3:
            raise ConfigError(f"proxy.model: {name} takes images with 3 channels, not {channels}")
        try:
            return torchvision.models.get_model(
                rest, weights=None, num_classes=classes, **_options(rest, image_size)
            )
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"proxy.model: {name} cannot be built for images of {image_size} pixels "
                f"({error_line(error)}); set proxy.image_size, for example to {preset.crop_size[0]}"
            ) from None

    def pretrained(image_size: int) -> Mapping[str, Tensor]:
        return _download(name, rest, published)

    return Network(
        name,
        make,
        input_size=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        pretrained=pretrained,
    )


def _options(rest: str, image_size: int) -> dict[str, Any]:
    """Return options of the networks that need more than the number of classes."""
    if rest in SEVERAL_CLASSIFIERS:
        return WITHOUT_AUXILIARY
    if rest.startswith("vit_"):
        return {"image_size": image_size}
    if rest.startswith("maxvit"):
        return {"input_size": (image_size, image_size)}
    return {}


def _download(name: str, rest: str, published: Any) -> Mapping[str, Tensor]:
    """Return published weights, through torch's own download and cache."""
    if rest in SEVERAL_CLASSIFIERS:
        raise ConfigError(
            f"proxy.weights: the published weights of {name} belong to a network with another "
            "normalisation inside; choose another network"
        )
    try:
        return published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, no space, a proxy's page instead of the file
        file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(published.url))
        raise ConfigError(
            f"proxy.weights: the weights of {name} cannot be downloaded ({error_line(error)}); put "
            f"{published.url} at {file}, or set proxy.weights to a safetensors file"
        ) from None
