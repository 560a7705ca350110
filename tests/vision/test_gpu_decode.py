"""JPEGs decoded by torchvision: the same rejects as on the CPU, and pixels within tolerance."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import photograph
from PIL import Image

from raypipe.errors import RaypipeError
from raypipe.vision import gpu_decode
from raypipe.vision.decode import decode, decode_batch, jpeg_pixels
from raypipe.vision.gpu_decode import MAX_PIXELS_PER_CALL, TOLERANCE, decode_jpegs, split_off_jpegs

LIMIT = 10_000_000


class Sample(NamedTuple):
    image: bytes | np.ndarray | None
    reason: str = ""


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def small(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(np.asarray(photograph(0).resize((width, height))))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(small(), exif=exif)


def broken() -> bytes:
    """Complete from the first to the last marker, but not decodable."""
    data = bytearray(encode(small()))
    table = data.index(b"\xff\xc4")  # a Huffman table
    data[table + 5 : table + 21] = b"\xff" * 16
    return bytes(data)


PLAIN = {
    "colour": encode(small(), quality=95),
    "grey": encode(small().convert("L")),
    "progressive": encode(small(), progressive=True),
}
OTHERS = {
    "PNG": encode(small(), "PNG"),
    "CMYK": encode(small().convert("CMYK")),
    "rotated": rotated(),
    "stored as RGB": encode(small(), keep_rgb=True),
    "two pictures": encode(small(), "MPO", save_all=True, append_images=[small()]),
    "cut off": PLAIN["colour"][:-40],
    "without its end": PLAIN["colour"][:-2],
    "empty": b"",
    "words": b"not an image",
}


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_what_is_a_plain_jpeg(name: str) -> None:
    if name in PLAIN:
        assert jpeg_pixels(PLAIN[name], LIMIT) == 60 * 80
        assert jpeg_pixels(PLAIN[name], 60 * 80 - 1) == 0, (
            "`decode` reports that it has too many pixels"
        )
    else:
        assert jpeg_pixels(OTHERS[name], LIMIT) == 0


SAMPLES = [Sample(image) for image in [*PLAIN.values(), *OTHERS.values(), broken()]]
SAMPLES += [
    Sample(None),
    Sample(None, "no such file"),
    Sample(PLAIN["grey"], "a bad label"),
    Sample(np.zeros((9, 9), np.uint8)),
]
SAMPLES += [Sample(encode(small(33, 33))), Sample(encode(small(20, 400)))]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
@pytest.mark.parametrize("size", [16, 33, 100])
def test_the_same_are_rejected_in_the_same_words(size: int, device: str) -> None:
    expected, reasons = decode_batch(SAMPLES, size, LIMIT)
    images, pixels, first_reasons = split_off_jpegs(SAMPLES, size, LIMIT)
    assert sum(map(bool, pixels)) == len(PLAIN) + 3, (
        "the broken one is noticed only when it is decoded"
    )
    result, decode_reasons = decode_jpegs(images, pixels, size, LIMIT, device, max_images=4)
    assert [
        new or first for new, first in zip(decode_reasons, first_reasons, strict=True)
    ] == reasons
    assert result.dtype == torch.uint8 and result.device.type == device
    decoded = result.cpu().numpy()
    aside = np.array(pixels) > 0
    assert np.array_equal(decoded[~aside], expected[~aside]), "the others are decoded as usual"
    assert np.abs(decoded.astype(int) - expected).mean() < TOLERANCE


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
@pytest.mark.parametrize("size", [64, 224])
def test_pixels_are_within_the_stated_tolerance(size: int, device: str) -> None:
    data = [encode(photograph(seed), quality=90) for seed in range(2)]
    result, _ = decode_jpegs(
        data, [jpeg_pixels(item, LIMIT) for item in data], size, LIMIT, device, max_images=8
    )
    expected = np.stack([decode(item, size, LIMIT) for item in data])
    difference = np.abs(result.cpu().numpy().astype(int) - expected)
    assert difference.mean() < (TOLERANCE if device == "cuda" else 1.3)
    if size == 224 and device == "cpu":
        # both decode at full scale: only rounding and the neighbours at two edges differ
        assert difference[..., 1:-1].max() <= 1 and difference.max() <= 20


def test_a_call_is_bounded_in_images_and_pixels() -> None:
    assert list(
        gpu_decode._calls(
            [5, 0, 5, 5, MAX_PIXELS_PER_CALL, MAX_PIXELS_PER_CALL * 2, 1, 0], max_images=2
        )
    ) == [
        [0, 2],
        [3],
        [4],
        [5],
        [6],
    ]
    assert list(gpu_decode._calls([0, 0], max_images=2)) == []


def test_no_more_is_set_aside_than_a_task_may_pass_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "MAX_BYTES_PER_TASK", 2 * len(PLAIN["colour"]))
    images, pixels, reasons = split_off_jpegs([Sample(PLAIN["colour"])] * 3, 8, LIMIT)
    assert [bool(count) for count in pixels] == [True, True, False] and reasons == [""] * 3
    assert np.array_equal(
        np.frombuffer(images[2], np.uint8).reshape(3, 8, 8), decode(PLAIN["colour"], 8, LIMIT)
    )


def test_a_device_that_cannot_is_named_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu_decode.check_gpu_decoding("cpu")

    def cannot(*_: object, **__: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr("torchvision.io.decode_jpeg", cannot)
    with pytest.raises(
        RaypipeError, match=r"on cuda \(.*nvJPEG support\); set embed\.decode to cpu"
    ):
        gpu_decode.check_gpu_decoding("cuda")
