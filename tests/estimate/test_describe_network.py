"""What `raypipe inspect` shows of the proxy's network."""

from __future__ import annotations

import pytest

from raypipe.config import ProxySettings
from raypipe.errors import ConfigError
from raypipe.estimate.describe_network import describe_network


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
