"""Find a network by the name in `proxy.model`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from raypipe.config.choices import (
    PROXY_MODELS,
    TIMM_PREFIX,
    TORCHVISION_PREFIX,
    is_own,
    unknown_model,
)
from raypipe.errors import ConfigError
from raypipe.proxies.network import Network


def find(name: str) -> Network:
    """Return the network of a name.

    Parameters
    ----------
    name : str
        One of `raypipe.config.choices.PROXY_MODELS`, `torchvision:NAME`, `timm:NAME`, or
        `module:function` of the user's own, whose code is imported.

    Raises
    ------
    ConfigError
        If there is no such network.
    """
    if name in PROXY_MODELS:
        from raypipe.proxies.resnets import resnet

        return resnet(name)
    library, _, rest = name.partition(":")
    if library == TORCHVISION_PREFIX and rest:
        from raypipe.proxies import torchvision_networks

        check_known(name, torchvision_networks.names())
        return torchvision_networks.network(name, rest)
    if library == TIMM_PREFIX and rest:
        from raypipe.proxies import timm_networks

        check_known(f"{library}:{rest.partition('.')[0]}", timm_networks.names())
        return timm_networks.network(name, rest)
    if is_own(name):
        from raypipe.proxies import own

        return own.network(name)
    raise ConfigError(f"proxy.{unknown_model(name)}")


def check_known(name: str, known: Iterable[str], setting: str = "proxy.model") -> None:
    """Raise ConfigError, with the nearest names, unless a library knows the network."""
    names, (library, _, rest) = list(known), name.partition(":")
    if rest in names:
        return
    near = difflib.get_close_matches(rest, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names[:5])}, ..."
    raise ConfigError(f"{setting}: {library} has no network {rest!r}; {hint}")
