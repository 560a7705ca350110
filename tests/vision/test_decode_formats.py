"""Rare formats, scaled against full decoding, and memory. See `raypipe.vision.decode`."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from bad_inputs import png_chunk
from helpers import photograph
from PIL import Image

from raypipe.vision.decode import BYTES_PER_PIXEL, BadImage, decode, open_image

LIMIT = 10_000_000
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
Colour = tuple[int, int, int]


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(depth: int, kind: int, pixel: bytes, *others: bytes) -> bytes:
    """Return a PNG of 8x8 equal pixels with the given bits per channel and colour type."""
    row = b"\0" + (pixel * 8)[: max(1, depth * len(pixel) * 8 // 8) if depth < 8 else None]
    header = struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0)
    body = (
        png_chunk(b"IHDR", header)
        + b"".join(others)
        + png_chunk(b"IDAT", zlib.compress(row * 8))
        + png_chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def ycck() -> bytes:
    """Return a red YCCK JPEG, as Photoshop writes it: Adobe's marker names the transform."""
    # Inverted CMYK of red is (255, 0, 0, 255). libjpeg takes C, M, Y for the complement of RGB,
    # here cyan: YCbCr (179, 171, 1).
    stored = Image.new("CMYK", (16, 16), (255 - 179, 255 - 171, 255 - 1, 0))
    data = bytearray(encode(stored, "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2  # the transform
    return bytes(data)


def cmyk_without_marker() -> bytes:
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    length = data.index(b"Adobe") - 2
    return data[: length - 2] + data[length + struct.unpack(">H", data[length : length + 2])[0] :]


RGB48 = struct.pack(">HHH", 0xABCD, 0x1234, 0x00FF)
TWO_PICTURES: dict[str, Any] = {
    "save_all": True,
    "append_images": [Image.new("RGB", (16, 16), c) for c in (BLUE, GREEN)],
}


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        pytest.param(png(16, 2, RGB48), (0xAB, 0x12, 0), 0, id="48-bit RGB"),
        pytest.param(png(16, 6, RGB48 + b"\xff\xff"), (0xAB, 0x12, 0), 0, id="64-bit RGBA"),
        pytest.param(
            png(16, 4, b"\xab\xcd\x80\x00"), (213, 213, 213), 1, id="32-bit grey with alpha"
        ),
        pytest.param(
            png(16, 0, b"\xab\xcd", png_chunk(b"tRNS", b"\xab\xcd")),
            (0xAB,) * 3,
            0,
            id="16-bit grey, its key is ignored",
        ),
        pytest.param(png(2, 0, b"\x55"), (85, 85, 85), 0, id="2-bit grey"),
        pytest.param(ycck(), RED, 4, id="YCCK"),
        pytest.param(cmyk_without_marker(), RED, 6, id="CMYK without a marker"),
        pytest.param(
            encode(Image.new("1", (16, 16), 1), "TIFF", compression="group4"), WHITE, 0, id="fax"
        ),
        pytest.param(
            encode(Image.new("LAB", (8, 8), (136, 208, 195)), "TIFF"), (250, 3, 11), 3, id="Lab"
        ),
        pytest.param(
            encode(Image.new("RGB", (16, 16), RED), "TIFF", compression="jpeg"),
            RED,
            3,
            id="JPEG in TIFF",
        ),
        pytest.param(
            encode(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "WEBP", lossless=True),
            (255, 127, 127),
            1,
            id="alpha",
        ),
        pytest.param(
            encode(Image.new("RGB", (16, 16), RED), "MPO", **TWO_PICTURES), RED, 3, id="MPO"
        ),
        pytest.param(
            encode(Image.new("RGB", (16, 16), RED), default_image=True, **TWO_PICTURES),
            RED,
            0,
            id="APNG, still",
        ),
        pytest.param(encode(Image.new("RGB", (16, 16), RED), **TWO_PICTURES), RED, 0, id="APNG"),
        pytest.param(
            encode(Image.new("RGB", (16, 16), RED), "WEBP", lossless=True, **TWO_PICTURES),
            RED,
            0,
            id="animated WebP",
        ),
    ],
)
def test_what_becomes_of_it(data: bytes, expected: Colour, tolerance: int) -> None:
    for size in (8, 16, 20):
        assert (
            np.abs(decode(data, size, LIMIT).astype(int) - np.array(expected)[:, None, None]).max()
            <= tolerance
        )


def test_an_orientation_behind_the_pixels_of_a_png_counts() -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    data = encode(Image.fromarray(pixels))
    assert data[-8:-4] == b"IEND"
    late = data[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    assert np.array_equal(decode(late, 8, LIMIT)[0], pixels[::-1])
    assert np.array_equal(decode(data, 8, LIMIT)[0], pixels)


LARGE = b"prompt\0" + b"x" * (3 << 20)
HIDDEN = zlib.compress(b"x" * (3 << 20))
XMP = b"XML:com.adobe.xmp\0"


@pytest.mark.parametrize(
    "others",
    [
        [png_chunk(b"tEXt", LARGE)] * 30,
        [png_chunk(b"zTXt", b"prompt\0\0" + HIDDEN)],
        [png_chunk(b"iTXt", b"prompt\0\1\0\0\0" + HIDDEN)],
        [png_chunk(b"iTXt", XMP + b"\1\0\0\0" + HIDDEN)],
        [png_chunk(b"iTXt", XMP + b"\0\0\0\0" + LARGE)] * 30,
        [png_chunk(b"iCCP", b"profile\0\0" + HIDDEN)],
        [png_chunk(b"iCCP", b"profile\0\0not compressed")],
        [png_chunk(b"pHYs", b"too short")[:-1] + b"?"],
    ],
    ids=["text", "zip", "international", "XMP", "much XMP", "profile", "no profile", "checksum"],
)
def test_metadata_of_a_png_cannot_cost_its_pixels(others: list[bytes]) -> None:
    plain = png(8, 2, bytes(RED))
    data = png(8, 2, bytes(RED), *others)
    expected = decode(plain, 8, LIMIT)
    assert np.array_equal(decode(data, 8, LIMIT), expected) and expected[0].min() == 255
    late = data.replace(b"".join(others), b"")[:-12] + b"".join(others) + data[-12:]
    assert np.array_equal(decode(late, 8, LIMIT), expected)
    with open_image(data) as opened:
        assert opened.size == (8, 8)


def test_an_orientation_in_a_text_of_a_png_still_counts() -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    exif = png_chunk(b"eXIf", Image.Exif().tobytes().removeprefix(b"Exif\0\0"))
    xmp = b'<x xmlns:tiff="t" tiff:Orientation="3"/>'
    text = png_chunk(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(xmp))
    data = encode(Image.fromarray(pixels))
    turned = data[:-12] + exif + text + data[-12:]
    with Image.open(io.BytesIO(turned)) as opened:
        opened.load()
        assert opened.getexif()[0x0112] == 3
    assert np.array_equal(decode(turned, 8, LIMIT)[0], pixels[::-1])


def test_a_png_that_ends_early_is_still_bad() -> None:
    data = png(8, 2, bytes(RED), png_chunk(b"tEXt", b"a\0b"))
    for end in (20, 40, 60):
        with pytest.raises(BadImage):
            decode(data[:end], 8, LIMIT)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 3), (64, 20_000)], ids=str)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF"])
def test_every_shape_works(shape: tuple[int, int], format: str) -> None:
    actual = decode(encode(Image.new("RGB", shape[::-1], (128, 128, 128)), format), 64, LIMIT)
    assert actual.shape == (3, 64, 64) and np.abs(actual.astype(int) - 128).max() <= 3


@pytest.mark.parametrize("shape", [(40, 300), (300, 40)])
@pytest.mark.parametrize("size", [16, 33, 40, 64])
def test_a_long_image_is_converted_in_part_and_the_pixels_are_those_of_the_whole(
    shape: tuple[int, int], size: int
) -> None:
    """The filter reads pixels next to the square: palette and RGB agree up to rounding."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    ).quantize(60)
    actual, whole = (
        decode(encode(form), size, LIMIT).astype(int) for form in (image, image.convert("RGB"))
    )
    assert np.abs(actual - whole).max() <= 1


@pytest.mark.parametrize(
    ("size", "mean", "most"), [(32, 2.4, 66), (64, 1.5, 57), (128, 2.0, 39), (224, 0.4, 7)]
)
def test_scaled_decoding_agrees_with_full_decoding_and_a_resize(
    size: int, mean: float, most: int
) -> None:
    """The differences are within those that the module states for photographs."""
    differences = []
    for seed in range(2):
        data = encode(photograph(seed), "JPEG", quality=90)
        full = (
            Image.open(io.BytesIO(data))
            .convert("RGB")
            .resize((size, size), Image.Resampling.BILINEAR, (120, 0, 880, 760))
        )
        differences.append(
            np.abs(decode(data, size, LIMIT).astype(int) - np.asarray(full).transpose(2, 0, 1))
        )
    assert np.mean(differences) < mean and np.max(differences) <= most


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_memory_is_bounded_by_the_pixels() -> None:
    """Of a long image only the square is converted: LA takes 4 bytes a pixel, not 12."""
    program = """
import io, sys
from PIL import Image
from raypipe.vision.decode import decode

def encoded(mode, size, format, **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format, **options)
    return buffer.getvalue()

def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

for mode, size, format, options in [
    ("LA", (16000, 250), "PNG", {}),
    ("LA", (2000, 2000), "PNG", {}),
    ("CMYK", (2000, 2000), "JPEG", {"progressive": True}),
    ("RGBA", (2000, 2000), "WEBP", {"lossless": True, "method": 0}),
    ("I", (2000, 2000), "TIFF", {}),
]:
    # import everything and fill caches before measuring
    decode(encoded(mode, (80, 80), format, **options), 64, 10**8)
    data = encoded(mode, size, format, **options)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    decode(data, 64, 10**8)
    print((peak() - before - (2 << 20)) / (size[0] * size[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    long, *square = map(float, done.stdout.split())
    assert long < 6 and max(square) <= BYTES_PER_PIXEL
    assert max(square) > 10, "the bound is not far from what is needed"
