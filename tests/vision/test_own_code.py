"""Functions of the user's own: `source.transform` and `proxy.augment`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raypipe.config import ProxySettings, SourceSettings, parse_config
from raypipe.errors import ConfigError
from raypipe.plugins import code_allowed
from raypipe.sources import RawSample
from raypipe.testing import ContractError, check_augment, check_transform
from raypipe.vision.decode import BadImage, decode, decode_batch
from raypipe.vision.own_code import (
    Augmentation,
    Transform,
    displayed,
    transform_of,
    transform_to_show,
)

ARRAY = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def _png(array: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


def _as(function: Callable[[Any], Any]) -> Transform:
    return Transform("mine:f", function)


@pytest.mark.parametrize("image", [ARRAY, _png(ARRAY)], ids=["array", "png"])
def test_without_a_change_the_pixels_are_those_of_plain_decoding(image: Any) -> None:
    plain = decode(image, 8, 10**6)
    same = decode(image, 8, 10**6, transform=_as(np.asarray))
    assert same.dtype == np.uint8 and same.shape == (3, 8, 8)
    assert np.abs(same.astype(int) - plain).max() <= 1  # reduced in one step instead of two


def test_a_transform_sees_the_image_upright_and_cannot_change_that_of_the_source() -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ARRAY).save(buffer, "PNG", exif=exif)
    sizes = []

    def transform(image: Image.Image) -> np.ndarray:
        sizes.append(image.size)
        return np.asarray(image)

    decode(buffer.getvalue(), 8, 10**6, transform=_as(transform))
    assert sizes == [(12, 20)]
    array = ARRAY.copy()

    def overwrite(image: np.ndarray) -> np.ndarray:
        image[:] = 0
        return image

    assert not decode(array, 8, 10**6, transform=_as(overwrite)).any()
    assert np.array_equal(array, ARRAY)


def test_sixteen_bits_are_windowed_by_the_users_rule() -> None:
    values = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)

    def window(image: Image.Image) -> np.ndarray:
        levels = (np.asarray(image).astype(float) - 1000) / 1000
        return (255 * levels.clip(0, 1)).astype(np.uint8)

    pixels = decode(_png(values), 64, 10**6, transform=_as(window))
    assert pixels[0].min() == 0 and pixels[0].max() == 255
    assert (pixels[0] == pixels[2]).all()
    assert ((pixels[0] > 0) & (pixels[0] < 255)).mean() == pytest.approx(1000 / 4096, abs=0.01)


def test_bytes_that_pillow_cannot_open_are_passed_on() -> None:
    def raw(data: bytes) -> np.ndarray:
        return np.frombuffer(data.removeprefix(b"RAW"), np.uint8).reshape(4, 4)

    pixels = decode(b"RAW" + bytes(range(16)), 4, 10**6, transform=_as(raw))
    assert pixels[1].ravel().tolist() == list(range(16))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels: int) -> None:
    stack = np.random.default_rng(1).integers(0, 256, (9, 9, channels), np.uint8)
    expected = stack.transpose(2, 0, 1)
    assert np.array_equal(decode(stack, 9, 10**6, channels=channels), expected)
    made = decode(b"x", 9, 10**6, transform=_as(lambda _: stack), channels=channels)
    assert np.array_equal(made, expected)
    assert displayed(expected).shape == (3, 9, 9)


def test_grey_is_one_channel_or_three_equal_ones() -> None:
    grey = decode(_png(ARRAY), 8, 10**6, channels=1)
    assert grey.shape == (1, 8, 8)
    assert np.array_equal(decode(ARRAY, 8, 10**6, channels=1), grey)
    with pytest.raises(BadImage, match=r"proxy\.channels is 5; set source\.transform"):
        decode(_png(ARRAY), 8, 10**6, channels=5)


def test_a_transform_that_raises_is_a_reject_with_its_message() -> None:
    def choosy(image: Any) -> np.ndarray:
        if np.asarray(image).mean() > 200:
            raise ValueError("no scan,\nonly glare")
        return np.asarray(image)

    samples = [RawSample("a", ARRAY, 0), RawSample("b", np.full((4, 4), 255, np.uint8), 0)]
    pixels, reasons = decode_batch(samples, 8, 10**6, transform=_as(choosy))
    assert reasons[0] == "" and pixels[0].any() and not pixels[1].any()
    assert reasons[1].startswith("source.transform: ValueError: no scan, only glare, test_own_code")


@pytest.mark.parametrize(
    ("result", "channels", "message"),
    [
        (ARRAY.astype(np.float32), 3, "mine:f returned float32; expected uint8"),
        (np.full((4, 4), np.nan), 3, "mine:f returned float64 with NaN; expected uint8"),
        (ARRAY.tolist(), 3, "mine:f returned list"),
        (ARRAY[..., :2], 3, r"shape \[12, 20, 2\]; .*\[height, width, 3\] \(proxy.channels\)"),
        (ARRAY, 5, r"shape \[12, 20, 3\]; expected uint8 \[height, width, 5\]"),
        (ARRAY[..., 0], 5, r"shape \[12, 20\]"),
        (ARRAY[:0], 3, r"shape \[0, 20, 3\]"),
        (ARRAY[None], 3, r"shape \[1, 12, 20, 3\]"),
    ],
)
def test_anything_but_pixels_ends_the_run(result: Any, channels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"source.transform: .*{message}"):
        decode(ARRAY, 8, 10**6, transform=_as(lambda _: result), channels=channels)


# -- augmentation ----------------------------------------------------------------------------------


def _shift(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    image += generator.integers(0, 50, dtype=np.uint8)
    return image


def test_augmentation_depends_on_sample_seed_and_epoch_alone() -> None:
    images = np.random.default_rng(2).integers(0, 200, (6, 3, 8, 8), np.uint8)
    augment, keys = Augmentation("mine:f", _shift), np.arange(6, dtype=np.uint64) + 2**63
    copy = images.copy()
    whole = augment(images, keys, 0, 3)
    assert np.array_equal(images, copy) and not np.array_equal(whole, images)
    order = [4, 1, 5]
    assert np.array_equal(augment(images[order], keys[order], 0, 3), whole[order])
    assert not np.array_equal(augment(images, keys, 0, 4), whole)
    assert not np.array_equal(augment(images, keys, 1, 3), whole)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image, _: image[1:], r"returned shape \[7, 8, 3\]; expected uint8 \[8, 8, 3\]"),
        (lambda image, _: image / 2, "returned float64; expected uint8"),
        (lambda image, _: image.no, r"failed \(AttributeError: .*test_own_code.py line"),
        (lambda image: image, r"failed \(TypeError"),
    ],
)
def test_a_broken_augmentation_ends_the_training(function: Any, message: str) -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    with pytest.raises(ConfigError, match=f"proxy.augment: mine:f {message}"):
        Augmentation("mine:f", function)(images, [1, 2], 0, 0)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {"uri": "x", "transform": "f"}}, "source.transform: 'f' is not allowed: expec"),
        (
            {"proxy": {"augment": "a.b"}},
            "proxy.augment: 'a.b' is not allowed: expected module:name",
        ),
        ({"proxy": {"channels": 0}}, "proxy.channels: 0 is not allowed"),
        ({"proxy": {"channels": 5, "normalize": "imagenet"}}, "imagenet is for 3 channels, not 5"),
        (
            {"proxy": {"channels": 2, "normalize": {"mean": [0.5], "std": [1, 1]}}},
            "normalize.mean has 1 values for 2 channels",
        ),
        (
            {"source": {"uri": "x", "transform": "a:b"}, "embed": {"decode": "gpu"}},
            "embed.decode: a GPU decodes JPEGs to 3 channels without source.transform",
        ),
        (
            {
                "source": {"uri": "x", "label_column": None},
                "pseudo_labels": {"clusters": 3},
                "proxy": {"channels": 4},
            },
            "take 3 channels, not proxy.channels 4",
        ),
    ],
)
def test_settings_that_cannot_be_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"run": "r", "source": {"uri": "x"}, **change})
    assert message in str(caught.value)


def test_half_normalises_every_channel() -> None:
    settings = ProxySettings(channels=4, normalize="half")
    assert settings.statistics([0] * 4, [0] * 4) == ([0.5] * 4, [0.5] * 4)


def test_a_transform_is_imported_only_where_code_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "own_transform_1.py").write_text("import numpy\nf = numpy.asarray\n")
    settings = SourceSettings(uri="x", transform="own_transform_1:f")
    assert transform_to_show(settings) is None and "own_transform_1" not in sys.modules
    with pytest.raises(ConfigError, match=r"source\.transform: 'own_transform_1:f' is code"):
        transform_of(settings)
    with code_allowed():
        assert transform_of(settings) == transform_to_show(settings) != None  # noqa: E711
    del sys.modules["own_transform_1"]


# -- raypipe.testing -------------------------------------------------------------------------------


def test_sound_functions_pass() -> None:
    check_transform(np.asarray, Image.fromarray(ARRAY), channels=3)
    check_transform(lambda data: np.zeros((3, 3), np.uint8), b"any")
    check_augment(lambda image, generator: np.roll(image, generator.integers(9), 0), channels=5)


def test_broken_functions_are_named() -> None:
    def floats(image: Any) -> np.ndarray:
        return np.asarray(image) / 255

    def noisy(image: Any) -> np.ndarray:
        return np.random.default_rng().integers(0, 256, (4, 4), np.uint8)

    def overwrites(image: np.ndarray) -> np.ndarray:
        image[:] = 7
        return image

    for function, message in (
        (floats, "floats returned float64; expected uint8"),
        (noisy, "noisy: the same input gives other pixels at a second call"),
        (overwrites, "overwrites: changes its input"),
    ):
        with pytest.raises(ContractError, match=message):
            check_transform(function, ARRAY.copy())

    def careless(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return np.roll(image, np.random.randint(9), 0)

    for augment, message in (
        (careless, "careless: (the same input gives other pixels|draws from NumPy's global)"),
        (_shift, "_shift: changes its input image"),
        (lambda image, generator: image[:3], r"shape \[3, 24, 3\]"),
    ):
        with pytest.raises(ContractError, match=message):
            check_augment(augment)
