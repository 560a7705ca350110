"""Decode many JPEGs in one call with torchvision, on a GPU by nvJPEG; enabled by `embed.decode`.

A task passes plain JPEGs (see `raypipe.vision.decode.jpeg_pixels`) on to the actor that holds the
GPU and decodes all other images itself. JPEGs that the batch call refuses also go through
`raypipe.vision.decode.decode`, one by one. So the same samples are rejected, with the same
messages.

The pixels are those of decoding at full scale with an antialiased resize. On a CPU, with libjpeg,
they differ from `raypipe.vision.decode.decode` by the effect of scaled decoding (stated there),
by one level of rounding, and at the two edges where a long image was cropped, since here the
filter does not see the pixels beyond. nvJPEG has its own transform and its own way to upsample
the colour channels. The stated tolerance is a mean difference of `TOLERANCE` levels of 255 over
photographs; a test checks it where a GPU is available.
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
from raypipe.text import error_text
from raypipe.vision.decode import BadImage, EncodedSample, decode, decode_batch, jpeg_pixels

TOLERANCE = 3.0
"""Mean difference in levels of 255, over photographs, within which a GPU agrees with the CPU."""
MAX_PIXELS_PER_CALL = 1 << 24
"""Pixels decoded in one call, of three bytes each; a single image can have more."""
MAX_BYTES_PER_TASK = 1 << 30
"""Encoded bytes that a task passes on; it decodes the remaining images itself."""


def split_off_jpegs(
    samples: Iterable[EncodedSample], size: int, max_pixels: int, bit_depth: int = 16
) -> tuple[list[bytes], list[int], list[str]]:
    """Separate plain JPEGs, which are decoded elsewhere, and decode all other samples.

    Returns
    -------
    images : list[bytes]
        For each sample an encoded JPEG, or uint8 [3, size, size] as bytes, or b"" if there is no
        image.
    pixels : list[int]
        For each sample the number of pixels of the JPEG, or 0 if it is not an encoded JPEG.
    reasons : list[str]
        For each sample "" or the reason why there is no image.
    """
    images: list[bytes] = []
    pixels: list[int] = []
    reasons: list[str] = []
    encoded_bytes = 0
    for sample in samples:
        data, count, reason = sample.image, 0, ""
        if (
            isinstance(data, bytes)
            and not sample.reason
            and encoded_bytes + len(data) <= MAX_BYTES_PER_TASK
        ):
            count = jpeg_pixels(data, max_pixels)
        if count:
            assert isinstance(data, bytes)
            images.append(data)
            encoded_bytes += len(data)
        else:
            decoded, (reason,) = decode_batch([sample], size, max_pixels, bit_depth=bit_depth)
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
    max_images: int,
) -> tuple[Tensor, list[str]]:
    """Complete what `split_off_jpegs` began: decode the JPEGs and collect all pixels on the device.

    Parameters
    ----------
    images, pixels
        As returned by `split_off_jpegs`.
    size, max_pixels : int
        As for `raypipe.vision.decode.decode`.
    device : str
        Device that decodes and that holds the result.
    max_images : int
        Images per call.

    Returns
    -------
    result : Tensor
        uint8 [n, 3, size, size] on the device; zero where there is no image.
    reasons : list[str]
        For each JPEG "" or the reason why it cannot be decoded.
    """
    result = torch.zeros((len(images), 3, size, size), dtype=torch.uint8, device=device)
    reasons = [""] * len(images)
    decoded = [row for row in range(len(images)) if not pixels[row] and images[row]]
    if decoded:
        array = np.stack(
            [np.frombuffer(images[row], np.uint8).reshape(3, size, size) for row in decoded]
        )
        result[torch.tensor(decoded, device=device)] = torch.from_numpy(array).to(device)
    for rows in _calls(pixels, max_images):
        try:
            result[torch.tensor(rows, device=device)] = _decode(
                [images[row] for row in rows], size, device
            )
        except RuntimeError:  # raised for one of them, without naming it
            for row in rows:
                reasons[row] = _decode_one(images[row], size, max_pixels, device, result[row])
    return result, reasons


def check_gpu_decoding(device: str) -> None:
    """Check that torchvision can decode JPEGs on a device.

    Without this check every JPEG would silently be decoded on the CPU, one by one.

    Raises
    ------
    RaypipeError
        If it cannot.
    """
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(buffer, "JPEG")
    try:
        _decode([buffer.getvalue()], 8, device)
    except (RuntimeError, ImportError) as error:
        raise RaypipeError(
            f"torchvision cannot decode JPEGs on {device} ({error_text(error, 200)}); set "
            "embed.decode to cpu"
        ) from None


def _calls(pixels: Sequence[int], max_images: int) -> Iterable[list[int]]:
    """Yield the rows of the JPEGs of each call."""
    rows: list[int] = []
    total = 0
    for row, count in enumerate(pixels):
        if not count:
            continue
        if rows and (len(rows) == max_images or total + count > MAX_PIXELS_PER_CALL):
            yield rows
            rows, total = [], 0
        rows.append(row)
        total += count
    if rows:
        yield rows


def _decode_one(data: bytes, size: int, max_pixels: int, device: str, into: Tensor) -> str:
    """Decode one JPEG into a tensor; return "" or the reason why it cannot be decoded."""
    try:
        into.copy_(_decode([data], size, device)[0])
    except RuntimeError:
        try:
            into.copy_(torch.from_numpy(decode(data, size, max_pixels)))
        except BadImage as error:
            return str(error)
    return ""


def _decode(encoded: Sequence[bytes], size: int, device: str) -> Tensor:
    """Return uint8 [n, 3, size, size] on the device; raise RuntimeError if any image fails."""
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.frombuffer(bytearray(item), dtype=torch.uint8) for item in encoded]
    return torch.stack(
        [_square(image, size) for image in decode_jpeg(data, mode=ImageReadMode.RGB, device=device)]
    )


def _square(image: Tensor, size: int) -> Tensor:
    """Return the central square of [3, height, width], resized as in `raypipe.vision.decode`."""
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
