"""Read the weights that the training of a proxy starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from raypipe import storage
from raypipe.config import ProxySettings
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
    from safetensors import SafetensorError
    from safetensors.torch import load

    uri = settings.weights
    try:
        return load(storage.read_bytes(uri))
    except FileNotFoundError:
        raise ConfigError(f"proxy.weights: {uri}: no such file") from None
    except SafetensorError as error:
        raise ConfigError(
            f"proxy.weights: {uri} is not a safetensors file ({error}); save a state dict with "
            "safetensors.torch.save_file"
        ) from None
