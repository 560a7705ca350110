"""The network of `embed.model`, as the settings choose size and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raypipe import storage
from raypipe.config import Config
from raypipe.config.choices import WITHOUT_FILE, is_own_features
from raypipe.runs.initial_weights import identity_of_weights, read_state_dict
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from raypipe.proxies.feature_networks import FeatureNetwork, Features

SPREAD_SAMPLES = 1024
"""Seed samples that the spread of embeddings is measured on."""


def feature_size(config: Config, features: Features) -> int:
    """Return the side of the images that `embed.model` sees, in pixels."""
    if config.embed.image_size != "auto":
        return config.embed.image_size
    return features.input_size or config.proxy.image_size


def image_size_of_features(config: Config) -> int | None:
    """Return the same for the settings alone; None without a network."""
    if config.embed.network is None:
        return None
    if config.embed.image_size != "auto":
        return config.embed.image_size
    from raypipe.proxies.feature_networks import find_features

    return feature_size(config, find_features(config.embed.network))


def bound_features(config: Config) -> Config:
    """Return the configuration with a number in place of `embed.image_size: auto`.

    Code of the user's own is imported to learn it; what follows need not import it again.
    """
    size = image_size_of_features(config)
    if size is None:
        return config
    return config.model_copy(update={"embed": config.embed.model_copy(update={"image_size": size})})


def load_features(config: Config, device: str = "cpu") -> FeatureNetwork:
    """Return the network of `embed.model` on a device, in eval mode.

    Raises
    ------
    ConfigError
        If it cannot be built, or its weights cannot be read.
    """
    from raypipe.proxies.feature_networks import build_features, find_features

    assert config.embed.network is not None
    features, weights = find_features(config.embed.network), config.embed.weights
    if weights == "pretrained" and is_own_features(features.name):
        weights = "none"  # a function of the user's own loads its weights itself
    given = weights if weights in WITHOUT_FILE else read_state_dict(weights, "embed")
    size = feature_size(config, features)
    return build_features(features, size, config.proxy.channels, given).to(device)


def identity_of_features(config: Config) -> dict[str, str]:
    """Return what identifies weights and table of the features; nothing without features."""
    result = {}
    if config.embed.network is not None:
        result["weights"] = identity_of_weights(config.embed.weights, "embed")
        if published := _published(config.embed.network, config.embed.weights):
            result["published"] = published
    if config.embed.table is not None:
        from raypipe.runs.embedding_table import identity_of_table

        result["table"] = identity_of_table(config.embed.table)
    return result


def _published(name: str, weights: str) -> str:
    """Return what identifies the files of a network where its name does not; "" where it does."""
    library, _, rest = name.partition(":")
    if library == "transformers":
        from raypipe.proxies.transformers_features import identity_of_folder

        return identity_of_folder(rest)
    if library == "open_clip" and weights == "pretrained":
        from raypipe.proxies.open_clip_features import tag_of

        return tag_of(rest)
    return ""


def spread(embedding: np.ndarray) -> float:
    """Return the root mean squared distance of embeddings, float [n, d], to their mean."""
    return float(np.sqrt(embedding.astype(np.float64).var(0).sum())) if len(embedding) else 0.0


def write_scale(run: Run, first: np.ndarray, table: np.ndarray) -> None:
    """Write what the embeddings of a table are multiplied by, next to others of the same samples.

    Both then have the same spread, so that they weigh alike in a distance.
    """
    own, other = spread(first), spread(table)
    scale = own / other if own > 0 and other > 0 else 1.0
    storage.write_json(run.feature_scale, {"scale": scale, "samples": len(first)})


def read_scale(run: Run) -> float:
    """Return what the embeddings of a table are multiplied by; 1 where they are used alone."""
    try:
        return float(storage.read_json(run.feature_scale)["scale"])
    except FileNotFoundError:
        return 1.0
