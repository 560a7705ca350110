"""Classifiers of torchvision, as torchvision builds them.

Two things differ where they must: SqueezeNet, which ends in a convolution, gets a linear layer, and
the first convolution takes as many channels as the images have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.squeezenet import SqueezeNet

from raypipe.errors import ConfigError
from raypipe.proxies.downloads import unreachable
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
        try:
            built = torchvision.models.get_model(
                rest, weights=None, num_classes=classes, **_options(rest, image_size)
            )
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"proxy.model: {name} cannot be built for images of {image_size} pixels "
                f"({error_line(error)}); set proxy.image_size, for example to {preset.crop_size[0]}"
            ) from None
        if isinstance(built, SqueezeNet):
            built.classifier = _linear_classifier(classes)
        if channels != 3:
            _take_channels(built, channels)
        return built

    def pretrained(image_size: int) -> Mapping[str, Tensor]:
        weights = _download(name, rest, published)
        return _with_linear_classifier(weights) if rest.startswith("squeezenet") else weights

    return Network(
        name,
        make,
        input_size=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        pretrained=pretrained,
    )


def _linear_classifier(classes: int) -> nn.Sequential:
    """Return SqueezeNet's classifier with its 1 x 1 convolution after the mean over positions."""
    return nn.Sequential(
        nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)
    )


def _with_linear_classifier(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return SqueezeNet's published weights under the names and shapes of `_linear_classifier`."""
    result = dict(weights)
    result["classifier.3.weight"] = result.pop("classifier.1.weight").flatten(1)
    result["classifier.3.bias"] = result.pop("classifier.1.bias")
    return result


def _take_channels(network: nn.Module, channels: int) -> None:
    """Replace the first convolution with a new one that takes this number of channels."""
    name, stem = next(
        (name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
    )
    size: dict[str, Any] = {
        option: getattr(stem, option) for option in ("kernel_size", "stride", "padding")
    }
    folder, _, last = name.rpartition(".")
    replaced = nn.Conv2d(channels, stem.out_channels, bias=stem.bias is not None, **size)
    setattr(network.get_submodule(folder), last, replaced)


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
    file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(published.url))
    try:
        if not os.path.exists(file) and (reason := unreachable(published.url)):
            raise OSError(reason)
        return published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, no space, a proxy's page instead of the file
        raise ConfigError(
            f"proxy.weights: the weights of {name} cannot be downloaded ({error_line(error)}); "
            f"without a network, put {published.url} at {file} on each node, or set proxy.weights "
            "to a safetensors file"
        ) from None
