"""What `raypipe inspect` shows of the proxy's network."""

from __future__ import annotations

import pytest
from helpers import small_config

from raypipe.config import ProxySettings
from raypipe.errors import ConfigError
from raypipe.estimate.describe_network import describe_features, describe_network
from raypipe.estimate.feature_cost import feature_cost
from raypipe.proxies.sizes import size_of
from raypipe.vision.network_costs import macs


def test_size_of_a_network_is_shown() -> None:
    assert describe_network(ProxySettings(model="small", image_size=16)) == (
        "small: 0.2 M weights, embeddings of length 96, images of 16 pixels"
    )


def test_images_that_a_network_is_made_for_are_shown() -> None:
    text = describe_network(ProxySettings(model="torchvision:mobilenet_v3_small", image_size=64))
    assert text.startswith(
        "torchvision:mobilenet_v3_small: 1.5 M weights, embeddings of length 1024"
    )
    assert text.endswith("made for 224 pixels, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225")


def test_code_of_ones_own_is_not_imported() -> None:
    text = describe_network(ProxySettings(model="no_such_module_at_all:build"))
    assert "only a run imports" in text and "estimated as for resnet18" in text


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean convnext_tiny"):
        describe_network(ProxySettings(model="torchvision:convnext_tny"))


def test_features_are_shown_with_their_width() -> None:
    assert describe_features(small_config("run")) == ""
    text = describe_features(
        small_config("run", "embed.model=torchvision:mobilenet_v3_small", "embed.from=mine.parquet")
    )
    assert text == (
        "torchvision:mobilenet_v3_small: 1.5 M weights, embeddings of length 1024, images of 224 "
        "pixels; made for 224 pixels, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225 and the "
        "embeddings in mine.parquet, whose reading is not in the estimate"
    )
    text = describe_features(small_config("run", "embed.model=no_such_module_at_all:build"))
    assert text == (
        "no_such_module_at_all:build, code of your own, which only a run imports; costs are "
        "estimated as for resnet18"
    )


def test_cost_of_features_is_that_of_the_network() -> None:
    assert feature_cost(small_config("run")) is None
    name = "torchvision:mobilenet_v3_small"
    cost, proxy = feature_cost(small_config("run", f"embed.model={name}")), size_of(name, 224)
    assert cost is not None and cost.width == proxy.width == 1024
    assert cost.macs == pytest.approx(proxy.macs, rel=1e-3)  # the last layer is in one of them
    own = feature_cost(small_config("run", "embed.model=mine:build", "embed.image_size=64"))
    assert own is not None and own.macs == macs("resnet18", 64)
