"""Read the weights that the training of a proxy starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from raypipe import storage
from raypipe.config import ProxySettings
from raypipe.config.choices import WITHOUT_FILE
from raypipe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def read_weights(settings: ProxySettings) -> Mapping[str, Tensor] | None:
    """Return the state dict that `proxy.weights` names; None without one.

    Raises
    ------
    ConfigError
        If it cannot be read or downloaded.
    """
    if settings.weights == "none":
        return None
    if settings.weights == "pretrained":
        from raypipe.proxies.registry import find

        network = find(settings.model)
        if network.pretrained is None:
            raise ConfigError(
                f"proxy.weights: {settings.model} has no published weights; set proxy.weights to "
                "none or to a safetensors file"
            )
        return network.pretrained(settings.image_size)
    return read_state_dict(settings.weights, "proxy")


def read_state_dict(uri: str, section: str) -> Mapping[str, Tensor]:
    """Read a safetensors file that `weights` of a section names.

    Raises
    ------
    ConfigError
        If there is no such file, or it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(storage.read_bytes(uri))
    except FileNotFoundError:
        raise ConfigError(f"{section}.weights: {uri}: no such file") from None
    except SafetensorError as error:
        raise ConfigError(
            f"{section}.weights: {uri} is not a safetensors file ({error}); save a state dict with "
            "safetensors.torch.save_file"
        ) from None


def identity_of_weights(uri: str, section: str) -> str:
    """Return what identifies the content of the `weights` of a section, wherever the file is.

    Of a file on this machine, it is a hash of the content; elsewhere size and ETag. `none` and
    `pretrained` are returned as they are.

    Raises
    ------
    ConfigError
        If there is no such file.
    """
    if uri in WITHOUT_FILE:
        return uri
    try:
        if storage.is_local(uri):
            return hashlib.blake2b(storage.read_bytes(uri), digest_size=16).hexdigest()
        info = storage.info(uri)
    except FileNotFoundError:
        raise ConfigError(f"{section}.weights: {uri}: no such file") from None
    return f"size {info.size}, stamp {info.stamp}"
