from __future__ import annotations

import io
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from bad_inputs import bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raypipe.vision.decode import BadImage, decode, decode_batch, decode_sizes, encode_thumbnail

LIMIT = 10_000_000
# pytest shows warnings that the module silences
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / width * 6)], -1
    ).astype(np.uint8)


def plain(mode: str, colour: Any, size: int = 16) -> Image.Image:
    return Image.new(mode, (size, size), colour)


@pytest.mark.parametrize("size", [8, 32, 33])
def test_an_image_of_the_right_size_is_not_resampled(size: int) -> None:
    pixels = noise(size, size)
    assert np.array_equal(
        decode(encode(Image.fromarray(pixels)), size, LIMIT), pixels.transpose(2, 0, 1)
    )
    assert np.array_equal(decode(pixels, size, LIMIT), pixels.transpose(2, 0, 1))


def test_a_jpeg_of_the_right_size_is_what_pillow_decodes() -> None:
    data = encode(Image.fromarray(noise(32, 32)), "JPEG")
    assert np.array_equal(
        decode(data, 32, LIMIT), np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    )


def test_the_centre_is_kept() -> None:
    pixels = noise(32, 50)
    assert np.array_equal(decode(pixels, 32, LIMIT), pixels[:, 9:41].transpose(2, 0, 1))
    assert np.array_equal(
        decode(pixels.transpose(1, 0, 2).copy(), 32, LIMIT), pixels[:, 9:41].transpose(2, 1, 0)
    )


def test_reduction_is_antialiased() -> None:
    checkers = np.indices((512, 512)).sum(0) % 2 * 255  # one pixel black, one white
    for data in (
        encode(Image.fromarray(checkers.astype(np.uint8))),
        encode(Image.fromarray(checkers.astype(np.uint8)), "JPEG"),
    ):
        assert np.abs(decode(data, 32, LIMIT).astype(int) - 127).max() <= 3


@pytest.mark.parametrize("shape", [(480, 640), (2000, 300), (65, 64), (1, 1), (40, 300)])
def test_scaled_decoding_is_close_to_a_full_resize(shape: tuple[int, int]) -> None:
    pixels = smooth(*shape)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    reference = Image.fromarray(pixels[top : top + side, left : left + side]).resize(
        (64, 64), Image.Resampling.BILINEAR
    )
    actual = decode(encode(Image.fromarray(pixels), "JPEG", quality=95), 64, LIMIT)
    assert actual.shape == (3, 64, 64) and actual.dtype == np.uint8
    assert np.abs(actual.astype(int) - np.asarray(reference).transpose(2, 0, 1)).mean() < 4


def test_a_small_image_is_enlarged_and_stays_grey() -> None:
    grey = np.zeros((8, 8), np.uint8)
    grey[2:6, 4:] = 255
    actual = decode(grey, 32, LIMIT)
    assert np.array_equal(actual[0], actual[1]) and np.array_equal(actual[0], actual[2])
    assert actual[0, 12:20, 22:].min() == 255 and actual[0, :, :10].max() == 0
    assert np.array_equal(actual, decode(encode(Image.fromarray(grey)), 32, LIMIT))
    assert np.array_equal(actual, decode(grey[:, :, None], 32, LIMIT))


@pytest.mark.parametrize(
    ("image", "format", "options", "expected", "tolerance"),
    [
        (plain("L", 77), "PNG", {}, (77, 77, 77), 0),
        (plain("L", 77), "JPEG", {}, (77, 77, 77), 1),
        (plain("1", 1), "PNG", {}, WHITE, 0),
        (plain("CMYK", (0, 255, 255, 0)), "JPEG", {"quality": 95}, RED, 6),
        (plain("CMYK", (0, 255, 255, 0)), "TIFF", {}, RED, 0),
        (plain("RGBA", (255, 0, 0, 0)), "PNG", {}, WHITE, 0),
        (plain("RGBA", (255, 0, 0, 255)), "WEBP", {"lossless": True}, RED, 0),
        (plain("RGBA", (0, 0, 0, 51)), "PNG", {}, (204, 204, 204), 1),
        (plain("LA", (0, 0)), "PNG", {}, WHITE, 0),
        (plain("RGB", RED), "PNG", {"transparency": RED}, WHITE, 0),
        (plain("L", 7), "PNG", {"transparency": 7}, WHITE, 0),
        (plain("RGB", GREEN).quantize(4), "PNG", {}, GREEN, 0),
        (plain("RGB", GREEN).quantize(4), "GIF", {}, GREEN, 0),
        (plain("RGB", BLUE), "BMP", {}, BLUE, 0),
        (plain("RGB", BLUE), "TIFF", {"compression": "tiff_lzw"}, BLUE, 0),
        (plain("YCbCr", (76, 85, 255)), "JPEG", {}, RED, 3),
        (plain("I;16", 0xABCD), "PNG", {}, (0xAB, 0xAB, 0xAB), 0),
        (plain("I;16", 0xABCD), "TIFF", {}, (0xAB, 0xAB, 0xAB), 0),
        (plain("I", 0xABCD), "TIFF", {}, (0xAB, 0xAB, 0xAB), 0),
    ],
)
@pytest.mark.parametrize("size", [8, 16, 24])
def test_every_colour_mode_becomes_rgb(
    image: Image.Image,
    format: str,
    options: dict[str, Any],
    expected: tuple[int, int, int],
    tolerance: int,
    size: int,
) -> None:
    actual = decode(encode(image, format, **options), size, LIMIT).astype(int)
    assert np.abs(actual - np.array(expected)[:, None, None]).max() <= tolerance


def test_a_transparent_palette_lies_over_white() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 16, 8))
    actual = decode(encode(image, "PNG", transparency=b"\x00\xff"), 16, LIMIT)
    assert tuple(actual[:, 0, 0]) == WHITE and tuple(actual[:, 15, 0]) == GREEN


def test_the_edge_of_a_transparent_shape_takes_no_hidden_colour() -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)  # transparent black
    pixels[:, 32:] = (255, 255, 255, 255)
    assert decode(encode(Image.fromarray(pixels)), 16, LIMIT).min() >= 254


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    upright = np.zeros((64, 96, 3), np.uint8)  # red left, green right, blue bottom
    upright[:, :48], upright[:, 48:], upright[40:] = RED, GREEN, BLUE
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = Image.fromarray(upright)
    if orientation in undo:
        stored = stored.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"lossless": True}
        if format == "WEBP"
        else {"quality": 95, "subsampling": 0}
        if format == "JPEG"
        else {}
    )
    actual = decode(encode(stored, format, exif=exif, **options), 64, LIMIT).astype(int)
    expected = upright[:, 16:80].transpose(2, 0, 1).astype(int)
    assert np.abs(actual - expected).mean() < 6


def test_damaged_exif_is_ignored() -> None:
    data = encode(
        plain("RGB", RED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage", quality=95
    )
    assert decode(data, 16, LIMIT)[0].min() > 240


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(
        plain("RGB", RED), format, save_all=True, append_images=[plain("RGB", BLUE)], **options
    )
    assert tuple(decode(data, 16, LIMIT)[:, 8, 8]) == RED


def test_wrong_extension_or_not_the_content_decides() -> None:
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        assert decode(encode(plain("RGB", WHITE), format), 8, LIMIT).min() >= 254


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_truncated_images_are_refused(format: str, share: float) -> None:
    data = encode(Image.fromarray(noise(64, 64)), format)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * share)], 32, LIMIT)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "an HTML page instead of the file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable"),
        (b"\0" * 100, "not a readable"),
        (np.zeros((4, 4), np.float32), "float32"),
        (np.zeros((4, 4, 5), np.uint8), "shape"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.zeros(16, np.uint8), "shape"),
        (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "floating"),
        (encode(Image.new("I", (4, 4), 1 << 20), "TIFF"), "32-bit"),
    ],
)
def test_reasons_say_what_is_wrong(data: bytes | np.ndarray, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        decode(data, 8, LIMIT)


def test_the_pixel_limit_is_the_callers() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match=r"30000x30000 pixels are more than max_pixels = 1000000"):
        decode(bomb(30_000, 30_000), 8, 1_000_000)
    # Pillow's own limit would refuse this many pixels before decoding
    with pytest.raises(BadImage, match=r"truncated|broken"):
        decode(bomb(20_000, 10_000), 8, 300_000_000)
    with pytest.raises(BadImage, match="max_pixels"):
        decode(np.zeros((11, 10), np.uint8), 8, 100)
    assert decode(np.zeros((10, 10), np.uint8), 8, 100).shape == (3, 8, 8)
    assert before == Image.MAX_IMAGE_PIXELS


def test_nothing_is_printed_and_no_warning_escapes() -> None:
    program = """
import io, sys
from PIL import Image
from raypipe.vision.decode import BadImage, decode
image = Image.new("P", (16, 16), 1)
image.putpalette([255, 0, 0, 0, 255, 0])
files = [(image, "PNG", {"transparency": b"\\x00\\xff"}), (image, "GIF", {"transparency": 0})]
files += [(Image.new("RGB", (9500, 9500)), "PNG", {}), (Image.new("RGB", (300, 300)), "TIFF", {})]
exif = b"Exif\\0\\0MM\\0*\\xff\\xff\\xff\\xffgarbage"
files += [(Image.new("RGB", (16, 16)), "JPEG", {"exif": exif})]
for image, format, options in files:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    data = buffer.getvalue()
    for cut in (data, data[: len(data) // 2], data[:30] + b"\\xff" * 20 + data[50:]):
        try:
            decode(cut, 8, 100_000_000)
        except BadImage:
            pass
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Sample(NamedTuple):
    image: bytes | np.ndarray | None
    reason: str = ""


def test_a_batch_holds_zeros_and_a_reason_for_each_bad_image() -> None:
    samples = [
        Sample(encode(plain("RGB", RED))),
        Sample(b"junk"),
        Sample(None, "no such file"),
        Sample(None),
        Sample(noise(8, 8)),
    ]
    pixels, reasons = decode_batch(samples, 8, LIMIT)
    assert pixels.shape == (5, 3, 8, 8) and pixels.dtype == np.uint8
    assert [bool(reason) for reason in reasons] == [False, True, True, True, False]
    assert reasons[2] == "no such file"
    assert pixels[0, 0].min() == 255 and not pixels[1:4].any()
    assert np.array_equal(pixels[4], samples[4].image.transpose(2, 0, 1))  # type: ignore[union-attr]
    empty, none = decode_batch([], 8, LIMIT)
    assert empty.shape == (0, 3, 8, 8) and none == []


def test_a_sample_that_lacks_one_of_several_sizes_is_rejected() -> None:
    samples = [Sample(noise(16, 16, number)) for number in range(3)]
    calls = iter(range(6))

    def transform(image: np.ndarray, channels: int | None) -> np.ndarray:
        if next(calls) == 3:  # the second size of the second sample
            raise ValueError("no such window")
        return image

    (small, large), reasons = decode_sizes(samples, [8, 16], LIMIT, transform=transform)
    assert reasons[::2] == ["", ""] and "no such window" in reasons[1]
    assert small[0].any() and small[2].any() and not small[1].any() and not large[1].any()
    alone, _ = decode_batch(samples, 8, LIMIT)
    np.testing.assert_array_equal(small[2], alone[2])
    np.testing.assert_array_equal(large[2], decode_batch(samples, 16, LIMIT)[0][2])


def test_samples_that_are_read_one_by_one_are_not_held() -> None:
    read: list[weakref.ref[np.ndarray]] = []

    def samples() -> Iterator[Sample]:
        for number in range(10):
            pixels = noise(8, 8, number)
            read.append(weakref.ref(pixels))
            yield Sample(pixels)
            assert sum(ref() is not None for ref in read) <= 2

    pixels, reasons = decode_batch(samples(), 8, LIMIT, 12)
    assert len(read) == len(reasons) == 10 and pixels[9].any() and not pixels[10:].any()


@pytest.mark.parametrize("size", [8, 64])
def test_thumbnails_show_the_image(size: int) -> None:
    pixels = smooth(size, size).transpose(2, 0, 1)
    actual = np.asarray(Image.open(io.BytesIO(encode_thumbnail(pixels))))
    assert actual.shape == (size, size, 3)
    assert np.abs(actual.astype(int) - pixels.transpose(1, 2, 0)).mean() < 6


SEEDS = [
    encode(Image.fromarray(smooth(40, 56)), "JPEG", exif=Image.Exif()),
    encode(Image.fromarray(smooth(40, 56)), "JPEG", progressive=True),
    encode(Image.fromarray(smooth(40, 56)), "PNG"),
    encode(Image.fromarray(smooth(40, 56)), "WEBP"),
    encode(Image.fromarray(smooth(40, 56)), "TIFF", compression="tiff_lzw"),
    encode(Image.fromarray(smooth(40, 56)).quantize(16), "GIF"),
    encode(Image.fromarray(smooth(40, 56)), "BMP"),
]


@settings(max_examples=300, deadline=None)
@given(
    which=st.integers(0, len(SEEDS) - 1),
    keep=st.floats(0, 1),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12
    ),
    head=st.booleans(),
)
def test_damage_gives_pixels_or_bad_image(
    which: int, keep: float, changes: list[tuple[float, int]], head: bool
) -> None:
    data = SEEDS[which]
    damaged = bytearray(data[: int(len(data) * keep)] if changes == [] else data)
    for place, value in changes:
        damaged[int(place * min(len(damaged), 64 if head else len(damaged)))] = value
    try:
        pixels = decode(bytes(damaged), 16, 1_000_000)
    except BadImage as error:
        assert str(error)
    else:
        assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
