"""Describe the networks of a run: their size, and the images that they are made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypipe.config import Config, ProxySettings
from raypipe.config.choices import PROXY_MODELS, is_own, is_own_features
from raypipe.estimate import rates
from raypipe.estimate.feature_cost import feature_cost
from raypipe.vision.network_costs import LIKE_OWN

if TYPE_CHECKING:
    from raypipe.proxies.features import Features
    from raypipe.proxies.network import Network


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

    return text + _made_for(find(settings.model))


def describe_features(config: Config) -> str:
    """Return in words what is used next to the embeddings of the proxy, or instead; "" for nothing.

    The user's own code is not imported, and the table is not read.

    Raises
    ------
    ConfigError
        If a library has no such network, or is not installed.
    """
    embed = config.embed
    if not embed.has_features:
        return ""
    parts = ["the embeddings of the proxy"] if embed.uses_proxy else []
    if embed.network is not None:
        parts.append(_describe_feature_network(config, embed.network))
    if embed.table is not None:
        parts.append(f"the embeddings in {embed.table}, whose reading is not in the estimate")
    return " and ".join(parts)


def _describe_feature_network(config: Config, name: str) -> str:
    if is_own_features(name):
        return (
            f"{name}, code of your own, which only a run imports; costs are estimated as for "
            f"{LIKE_OWN}"
        )
    from raypipe.proxies.feature_networks import find_features

    cost = feature_cost(config)
    assert cost is not None
    return (
        f"{name}: {cost.parameters / 1e6:,.1f} M weights, embeddings of length {cost.width}, "
        f"images of {cost.image_size} pixels{_made_for(find_features(name))}"
    )


def _made_for(network: Network | Features) -> str:
    """Return the images that a network is made for; "" if it states none."""
    if network.input_size is None or network.mean is None or network.std is None:
        return ""
    mean, std = (", ".join(f"{value:g}" for value in row) for row in (network.mean, network.std))
    return f"; made for {network.input_size} pixels, mean {mean}, std {std}"
