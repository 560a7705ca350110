"""Networks of the user's own, from a function that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from raypipe.errors import ConfigError
from raypipe.plugins import failure, load
from raypipe.proxies.network import Network


def network(name: str) -> Network:
    """Return the network of `module:function`, which is imported here.

    The function gets classes, image_size and channels, and returns the classifier. Its attribute
    `default_cfg`, if it has one, states what the network is made for as timm does: `input_size`
    (channels, height, width), `mean` and `std`.

    Raises
    ------
    ConfigError
        If the function cannot be imported.
    """
    function = load(name, "proxy.model")
    stated = stated_by("proxy.model", name, function)

    def make(classes: int, image_size: int, channels: int) -> nn.Module:
        given = {"classes": classes, "image_size": image_size, "channels": channels}
        return called("proxy.model", name, function, given)

    return Network(
        name,
        make,
        input_size=stated["input_size"][-1] if "input_size" in stated else None,
        mean=tuple(stated["mean"]) if "mean" in stated else None,
        std=tuple(stated["std"]) if "std" in stated else None,
    )


def called(setting: str, name: str, function: Any, given: Mapping[str, int]) -> nn.Module:
    """Return the network that a function returns. Raises ConfigError if it returns none."""
    try:
        module = function(*given.values())
    except (Exception, SystemExit) as error:  # whatever the function raises
        arguments = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ConfigError(f"{setting}: {name}({arguments}) raised {failure(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{setting}: {name} returned a {type(module).__name__}; it must return a "
            "torch.nn.Module"
        )
    return module


def stated_by(setting: str, name: str, function: Any) -> Mapping[str, Any]:
    """Return what a function states about its network. Raises ConfigError unless it is usable."""
    stated = getattr(function, "default_cfg", {})
    try:
        sizes = all(int(value) > 0 for value in stated.get("input_size", ()))
        mean, std = ([float(value) for value in stated.get(key, ())] for key in ("mean", "std"))
        usable = sizes and len(mean) == len(std) and all(0 <= value <= 1 for value in mean + std)
    except (AttributeError, TypeError, ValueError):
        usable = False
    if not usable:
        raise ConfigError(
            f"{setting}: default_cfg of {name} must be a dict such as {{'input_size': "
            "(3, 64, 64), 'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)}, for pixels from 0 "
            "to 1"
        )
    return stated
