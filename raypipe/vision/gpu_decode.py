"""JPEGs decoded by torchvision, many in one call: on a GPU by nvJPEG. `embed.decode` asks for it.

A task sets JPEGs aside for the actor that has the GPU; whatever is not a plain JPEG (`raypipe.vision.decode.jpeg_pixels`) it decodes itself. What the
call for many refuses goes through `raypipe.vision.decode.decode` as well, image by image, so that the same samples are rejected, in the
same words.

Pixels are those of full decoding and an antialiased resize. On a CPU, with libjpeg, they differ from `raypipe.vision.decode.decode` by what scaled
decoding does, stated there, by one level of rounding, and at the two edges where a long image was cut, since here the filter does not see
what is beyond. nvJPEG has its own transform and its own way to enlarge the colour channels: the
stated tolerance is a mean difference of `TOLERANCE` levels of 255 over photographs; a test holds it where there is a GPU.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from raypipe.errors import RaypipeError
from raypipe.vision.decode import BadImage, Stored, decode, decode_batch, jpeg_pixels

TOLERANCE = 3.0
MOST_PIXELS = 1 << 24
"""Pixels of the images decoded in one call, of three bytes each; one image may have more."""
MOST_BYTES = 1 << 30
"""Encoded bytes that a task passes on at most; what is beyond it decodes itself."""


def split_off_jpegs(
    samples: Iterable[Stored], size: int, max_pixels: int
) -> tuple[list[bytes], list[int], list[str]]:
    """What a task passes on of samples whose JPEGs are decoded elsewhere.

    Returns, for each: a JPEG, or uint8 [3, size, size] as bytes; the pixels of the JPEG, or 0; "" or why there is no image, which is
    then b"".
    """
    images: list[bytes] = []
    pixels: list[int] = []
    reasons: list[str] = []
    held = 0
    for sample in samples:
        data, count, reason = sample.image, 0, ""
        if isinstance(data, bytes) and not sample.reason and held + len(data) <= MOST_BYTES:
            count = jpeg_pixels(data, max_pixels)
        if count:
            assert isinstance(data, bytes)
            images.append(data)
            held += len(data)
        else:
            decoded, (reason,) = decode_batch([sample], size, max_pixels)
            images.append(b"" if reason else decoded.tobytes())
        pixels.append(count)
        reasons.append(reason)
    return images, pixels, reasons


def decode_jpegs(
    images: Sequence[bytes],
    pixels: Sequence[int],
    size: int,
    max_pixels: int,
    device: str,
    at_once: int,
) -> tuple[Tensor, list[str]]:
    """The inverse of `split_off_jpegs`: uint8 [n, 3, size, size] on the device, and for each JPEG "" or why it cannot be decoded.

    at_once   images in one call, at most
    Where there is no image, pixels are zero.
    """
    result = torch.zeros((len(images), 3, size, size), dtype=torch.uint8, device=device)
    reasons = [""] * len(images)
    here = [row for row in range(len(images)) if not pixels[row] and images[row]]
    if here:
        array = np.stack(
            [np.frombuffer(images[row], np.uint8).reshape(3, size, size) for row in here]
        )
        result[torch.tensor(here, device=device)] = torch.from_numpy(array).to(device)
    for rows in _calls(pixels, at_once):
        try:
            result[torch.tensor(rows, device=device)] = _decode(
                [images[row] for row in rows], size, device
            )
        except RuntimeError:  # of one of them, which is not named
            for row in rows:
                reasons[row] = _one(images[row], size, max_pixels, device, result[row])
    return result, reasons


def check_gpu_decoding(device: str) -> None:
    """Raises RaypipeError where torchvision cannot decode JPEGs on a device; without this, all would be decoded one by one on the CPU."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(buffer, "JPEG")
    try:
        _decode([buffer.getvalue()], 8, device)
    except (RuntimeError, ImportError) as error:
        raise RaypipeError(
            f"torchvision cannot decode JPEGs on {device} ({' '.join(str(error).split())[:200]}); set embed.decode to cpu"
        ) from None


def _calls(pixels: Sequence[int], at_once: int) -> Iterable[list[int]]:
    """Rows of the JPEGs of each call."""
    rows: list[int] = []
    total = 0
    for row, count in enumerate(pixels):
        if not count:
            continue
        if rows and (len(rows) == at_once or total + count > MOST_PIXELS):
            yield rows
            rows, total = [], 0
        rows.append(row)
        total += count
    if rows:
        yield rows


def _one(data: bytes, size: int, max_pixels: int, device: str, into: Tensor) -> str:
    try:
        into.copy_(_decode([data], size, device)[0])
    except RuntimeError:
        try:
            into.copy_(torch.from_numpy(decode(data, size, max_pixels)))
        except BadImage as error:
            return str(error)
    return ""


def _decode(encoded: Sequence[bytes], size: int, device: str) -> Tensor:
    """uint8 [n, 3, size, size] on the device. Raises RuntimeError where one cannot be decoded."""
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.frombuffer(bytearray(item), dtype=torch.uint8) for item in encoded]
    return torch.stack(
        [_square(image, size) for image in decode_jpeg(data, mode=ImageReadMode.RGB, device=device)]
    )


def _square(image: Tensor, size: int) -> Tensor:
    """The central square of [3, height, width], resized as `raypipe.vision.decode` does."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[:, top : top + side, left : left + side]
    if side == size:
        return image
    return (
        F.interpolate(image[None].float(), (size, size), mode="bilinear", antialias=True)[0]
        .round()
        .clamp(0, 255)
        .byte()
    )
