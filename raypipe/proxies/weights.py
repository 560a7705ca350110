"""Initial weights of a proxy from a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from raypipe.config import ProxySettings
from raypipe.errors import ConfigError
from raypipe.proxies.weight_names import differences

OF_A_CHECKPOINT = ("backbone.", "head.", "mean", "std")
"""Starts of the names in a checkpoint of a run."""


class SplitNetwork(Protocol):
    """The part of `raypipe.proxies.networks.ProxyNet` that receives weights."""

    backbone: nn.Module
    head: nn.Linear
    head_name: str


def load_weights(
    model: SplitNetwork, weights: Mapping[str, Tensor], settings: ProxySettings
) -> None:
    """Load a state dict with the names of the classifier, or a checkpoint of a run.

    A last layer of another width is left as it is: it belongs to other classes.

    Parameters
    ----------
    model : SplitNetwork
        The proxy, with fresh weights.
    weights : Mapping[str, Tensor]
        The state dict.
    settings : ProxySettings
        `model` and `weights`, for the message of an error.

    Raises
    ------
    ConfigError
        If the weights are those of another network, or not finite.
    """
    if all(name.startswith(OF_A_CHECKPOINT) for name in weights):
        head_name = "head"
        body = {
            name.removeprefix("backbone."): value
            for name, value in weights.items()
            if name.startswith("backbone.")
        }
    else:
        head_name = model.head_name
        body = {
            name: value for name, value in weights.items() if not name.startswith(f"{head_name}.")
        }
    _check_body(model.backbone.state_dict(), body, settings)
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ConfigError(f"proxy.weights: {settings.weights}: {name} is not finite")
    model.backbone.load_state_dict(dict(body), strict=False)
    with torch.no_grad():
        weight = weights.get(f"{head_name}.weight")
        if weight is not None and weight.shape == model.head.weight.shape:
            model.head.weight.copy_(weight)
            bias = weights.get(f"{head_name}.bias")
            model.head.bias.copy_(torch.zeros_like(model.head.bias) if bias is None else bias)


def _check_body(
    own: Mapping[str, Tensor], body: Mapping[str, Tensor], settings: ProxySettings
) -> None:
    """Raise ConfigError unless a state dict has the names and shapes of a backbone."""
    missing = [
        name for name in own if name not in body and not name.endswith("num_batches_tracked")
    ]
    unexpected = sorted(name for name in body if name not in own)
    if missing or unexpected:
        found = differences({"missing": missing, "unexpected": unexpected})
        raise ConfigError(
            f"proxy.weights: {settings.weights} does not have the weights of {settings.model}: "
            f"{found}; set proxy.model to the network that they belong to"
        )
    for name, value in body.items():
        if value.shape != own[name].shape:
            raise ConfigError(
                f"proxy.weights: {name} has the shape {list(value.shape)} in {settings.weights}, "
                f"but {list(own[name].shape)} in {settings.model} for images of "
                f"{settings.image_size} pixels; set proxy.model or proxy.image_size to those that "
                "the weights belong to"
            )
