"""Progressive resizing: which trainings see smaller images first, and how small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from raypipe.config import Config, ProxySettings
from raypipe.stages.proxy.stage import ProxyStage
from raypipe.vision.training import shrink


def of(**sections: Any) -> Config:
    return Config(run="run", source={"uri": "digits://"}, **sections)


def test_sides_grow_with_the_epochs() -> None:
    settings = ProxySettings(image_size=64, epochs=10, progressive_resizing=True)
    sides = [settings.size_in_epoch(epoch) for epoch in range(10)]
    assert sides == [32] * 4 + [48] * 3 + [64] * 3
    assert settings.pixel_share == pytest.approx(0.4 * 0.25 + 0.3 * 0.5625 + 0.3)


@pytest.mark.parametrize(("size", "sides"), [(20, [16, 16, 20]), (16, [16] * 3), (8, [8] * 3)])
def test_small_images_stay_as_they_are(size: int, sides: list[int]) -> None:
    settings = ProxySettings(image_size=size, epochs=10, progressive_resizing=True)
    assert [settings.size_in_epoch(epoch) for epoch in (0, 5, 9)] == sides


@pytest.mark.parametrize(
    ("measure", "proxy", "expected"),
    [
        ({"scores": ["loss"]}, {}, True),
        ({"scores": ["loss", "el2n", "entropy"]}, {"model": "resnet18"}, True),
        ({"scores": ["loss", "moso"]}, {}, False),
        ({"scores": ["loss", "forgetting"]}, {}, False),
        ({"scores": ["el2n"], "el2n": {"at": "checkpoints"}}, {}, False),
        ({"scores": ["loss"]}, {"parts": 1}, False),
        ({"scores": ["loss"]}, {"model": "torchvision:vit_b_16"}, False),
        ({"scores": ["loss"]}, {"adversary": {"iterations": 2}}, False),
        ({"scores": ["moso"]}, {"progressive_resizing": True}, True),
        ({"scores": ["loss"]}, {"progressive_resizing": False}, False),
    ],
)
def test_auto_is_for_scores_from_embeddings(
    measure: dict[str, Any], proxy: dict[str, Any], expected: bool
) -> None:
    config = of(measure=measure, proxy={"image_size": 32, **proxy})
    assert config.proxy.progressive_resizing is expected
    assert (config.proxy.pixel_share < 1) is expected
    # a run that was trained before this setting existed is not trained again without it
    assert ProxyStage().settings(config).get("progressive_resizing", False) is expected


def test_auto_leaves_given_weights_alone() -> None:
    settings = ProxySettings(weights="proxy.safetensors")
    assert settings.resolved(from_embeddings=True).progressive_resizing is False


def test_adversarial_trainings_refuse_it() -> None:
    with pytest.raises(ValidationError, match="progressive_resizing"):
        ProxySettings(adversary={"iterations": 2}, progressive_resizing=True)


def test_images_shrink_as_pillow_shrinks_them() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    small = shrink(torch.from_numpy(images), 24).numpy()
    assert small.dtype == np.uint8 and small.shape == (2, 3, 24, 24)
    for before, after in zip(images.reshape(6, 32, 32), small.reshape(6, 24, 24), strict=True):
        expected = np.asarray(Image.fromarray(before).resize((24, 24), Image.Resampling.BILINEAR))
        assert np.abs(after.astype(int) - expected.astype(int)).max() <= 1
    assert np.array_equal(shrink(torch.from_numpy(images), 32).numpy(), images)
