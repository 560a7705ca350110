"""What the network of `embed.model` costs."""

from __future__ import annotations

from dataclasses import dataclass

from raypipe.config import Config
from raypipe.config.choices import is_own_features
from raypipe.estimate import rates
from raypipe.vision import network_costs


@dataclass(frozen=True)
class FeatureCost:
    """Size of a network of features.

    Attributes
    ----------
    image_size : int
        Side of the images that it sees, in pixels.
    parameters : int
        Weights.
    width : int
        Length of its embeddings.
    macs : float
        Multiply-adds of a forward pass of one image.
    """

    image_size: int
    parameters: int
    width: int
    macs: float


def feature_cost(config: Config) -> FeatureCost | None:
    """Return the size of the network of `embed.model`; None without one.

    Code of the user's own is not imported: it is assumed to be like another network.

    Raises
    ------
    ConfigError
        If a library has no such network, is not installed, or cannot process such images.
    """
    embed, name = config.embed, config.embed.network
    if name is None:
        return None
    if is_own_features(name):
        like = network_costs.LIKE_OWN
        size = config.proxy.image_size if embed.image_size == "auto" else embed.image_size
        return FeatureCost(
            size,
            rates.parameters(like, size),
            rates.width(like, size),
            network_costs.macs(like, size),
        )
    from raypipe.proxies.feature_networks import find_features
    from raypipe.proxies.sizes import size_of_features
    from raypipe.runs.features import feature_size

    size = feature_size(config, find_features(name))
    network = size_of_features(name, size, config.proxy.channels)
    return FeatureCost(size, network.parameters, network.width, network.macs)
