"""Describe the proxy's network: its size, and the images that it is made for."""

from __future__ import annotations

from raypipe.config import ProxySettings
from raypipe.config.choices import PROXY_MODELS, is_own
from raypipe.estimate import rates
from raypipe.vision.network_costs import LIKE_OWN


def describe_network(settings: ProxySettings) -> str:
    """Return the network of some settings in words, without importing the user's own code.

    Raises
    ------
    ConfigError
        If a library has no such network, or it cannot process images of this size.
    """
    size = settings.image_size
    if is_own(settings.model):
        return (
            f"{settings.model}: code of your own, which only a run imports; costs are estimated as "
            f"for {LIKE_OWN}"
        )
    weights = rates.parameters(settings.model, size) / 1e6
    text = (
        f"{settings.model}: {weights:,.1f} M weights, embeddings of length "
        f"{rates.width(settings.model, size)}, images of {size} pixels"
    )
    if settings.model in PROXY_MODELS:
        return text
    from raypipe.proxies.registry import find

    network = find(settings.model)
    if network.input_size is None or network.mean is None or network.std is None:
        return text
    mean, std = (", ".join(f"{value:g}" for value in row) for row in (network.mean, network.std))
    return f"{text}; made for {network.input_size} pixels, mean {mean}, std {std}"
