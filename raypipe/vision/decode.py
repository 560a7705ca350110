"""Encoded images to pixels: every defect becomes a `BadImage` whose words go into `rejects/`.

The result is always RGB, uint8, square. What becomes of other images:

- greyscale of any depth: three equal channels; bilevel: black and white; a palette: its colours
- 16 bits a channel (PNG, TIFF): the high byte; 32-bit and floating-point pixels are refused
- CMYK and YCCK, Lab and YCbCr: converted without their profiles. A JPEG's CMYK is taken for inverted, as Adobe writes it,
  whether or not it has Adobe's marker
- transparency (alpha, a palette's, the colour key of 8-bit images): laid over white. Colour keys of other depths are ignored
- several frames or pictures (GIF, WebP, APNG, TIFF, MPO): the first. That of an APNG is what a viewer without animation shows
- EXIF orientation: applied, wherever in the file it stands

A JPEG much larger than what is wanted is decoded at 1/2, 1/4 or 1/8, as long as its shorter side keeps `DRAFT` times the size, and
resized from there. Against decoding all of it and resizing with antialiasing (bilinear), on 192 ImageNet photographs of 106 to 1200
pixels, the difference in levels of 255 is

    size   mean    worst image's mean   largest
      32   2.4     6.8                  66
      64   1.5     5.3                  57
     128   0.09    2.0                  39
     224   0.01    0.4                   7

Memory: at most `BYTES_PER_PIXEL` for each pixel of the image, whatever its shape and mode, beside the bytes given and the result; a
lossless WebP takes the most, an RGB image 4, a JPEG decoded at 1/8 next to nothing. So `max_pixels` bounds it. Of a long image
no more than the central square is converted.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from raypipe.errors import RaypipeError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Other formats Pillow knows are not: some run other programs, such as PostScript."""

DRAFT = 1.75
"""A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves so many times the size wanted. At 64 pixels, 1.5 differs by 1.7 instead of
1.5 levels, in the worst image by 7.5 instead of 5.3, and is no faster; 1 a tenth faster by 3.6; 2 a twentieth slower by 1.3."""
BYTES_PER_PIXEL = 20
"""The most memory that decoding takes; see above."""

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_limit = threading.Lock()

# Pillow warns of what it mends in a damaged file (palette, EXIF, TIFF tags); a million images would drown the log.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")


class BadImage(RaypipeError):
    """An image that cannot be used; the message is the reject reason."""


class Stored(Protocol):
    """What `decode_batch` needs of a sample: `raypipe.sources.RawSample` is one."""

    @property
    def image(self) -> bytes | np.ndarray | None: ...

    @property
    def reason(self) -> str: ...


def decode(image: bytes | np.ndarray, size: int, max_pixels: int) -> np.ndarray:
    """Pixels of one image, uint8 [3, size, size].

    The shorter side is resized to `size` (antialiased bilinear; smaller images are enlarged), then the centre is cut out.
    An image whose shorter side has `size` pixels already is not resampled at all. Any shape will do, from 1x1 on.

    image       encoded bytes, or uint8 [height, width], [height, width, 1] or [height, width, 3]
    max_pixels  an image whose header states more pixels is refused before it is decoded

    Raises BadImage, whatever is wrong with the bytes.
    """
    opened: Image.Image
    try:
        opened = _from_array(image) if isinstance(image, np.ndarray) else _from_bytes(image)
        width, height = opened.size
        if width * height > max_pixels:
            raise BadImage(f"{width}x{height} pixels are more than max_pixels = {max_pixels}")
        if width < 1 or height < 1:
            raise BadImage(f"no pixels: {width}x{height}")
        opened.draft(None, (int(DRAFT * size), int(DRAFT * size)))  # a JPEG alone heeds it
        opened.load()
        orientation = _orientation(opened)  # a PNG can have it behind its pixels
        pixels = _over_white(_square(opened, size))
        if orientation in _ORIENTATIONS:
            pixels = pixels.transpose(_ORIENTATIONS[orientation])
        return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not a readable JPEG, PNG, WebP, GIF, BMP or TIFF image") from None
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything for damaged bytes: OSError, SyntaxError, ValueError, struct.error, IndexError
        raise BadImage(f"cannot be decoded: {_words(error)}") from None


def decode_batch(
    samples: Iterable[Stored], size: int, max_pixels: int, count: int | None = None
) -> tuple[np.ndarray, list[str]]:
    """Pixels of many samples, uint8 [n, 3, size, size], and for each "" or why it has none; its pixels are then zero.

    count  how many samples there are; needed where they have no length. They are taken one by one, so that what a generator reads
           need not be in memory all at once
    """
    if count is None:
        samples = list(samples)
        count = len(samples)
    pixels = np.zeros((count, 3, size, size), np.uint8)
    reasons: list[str] = []
    for position, sample in enumerate(samples):
        reason = sample.reason or ("" if sample.image is not None else "no image")
        if not reason and sample.image is not None:
            try:
                pixels[position] = decode(sample.image, size, max_pixels)
            except BadImage as error:
                reason = str(error)
        reasons.append(reason)
    return pixels, reasons


def jpeg_pixels(data: bytes, max_pixels: int) -> int:
    """The number of pixels of a plain JPEG, one on which decoders agree; 0 for anything else, whether or not it is an image.

    Plain is: complete to its end marker and one picture, greyscale or YCbCr, upright, with at most `max_pixels`. Only the header is read.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return 0
    try:
        image = _from_bytes(data)
        stored_as_rgb = image.info.get("adobe_transform") == 0 or [
            layer[0] for layer in getattr(image, "layer", ())
        ] == [*b"RGB"]
        plain = image.format == "JPEG" and (
            image.mode == "L" or (image.mode == "RGB" and not stored_as_rgb)
        )
        count = image.width * image.height
        return (
            count
            if plain and 0 < count <= max_pixels and _orientation(image) not in _ORIENTATIONS
            else 0
        )
    except Exception:
        return 0  # whoever decodes it says what is wrong


def encode_thumbnail(pixels: np.ndarray, quality: int = 88) -> bytes:
    """A JPEG of uint8 [3, height, width], for reports."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(
        buffer, "JPEG", quality=quality, subsampling=0
    )
    return buffer.getvalue()


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise BadImage(f"pixels are {array.dtype}, not uint8")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise BadImage(
            f"pixels have shape {list(array.shape)}, not [height, width] or [height, width, 3]"
        )
    if array.size == 0:
        raise BadImage(f"no pixels: shape {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


def _from_bytes(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise BadImage("empty: 0 bytes")
    with _own_limit():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.decodermaxblock = max(
        ImageFile.MAXBLOCK, len(data)
    )  # all in one piece; in several, JPEGs are scanned in part twice
    return image


@contextlib.contextmanager
def _own_limit() -> Iterator[None]:
    """Pillow's limit of pixels is lifted: it is one for the whole process, ours is the caller's and checked before decoding."""
    with _limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    if not image.info.get("exif"):  # nor has a TIFF any: Pillow turns it itself when it loads it
        return 1
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1  # damaged EXIF says nothing about the pixels


def _plain(image: Image.Image) -> Image.Image:
    """The image as L, RGB or RGBA, the modes that can be resized faithfully."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("32-bit pixels are not supported")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("floating-point pixels are not supported")
    wanted = "RGBA" if image.has_transparency_data else "L" if image.mode in {"1", "L"} else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The central square, resized, as L, RGB or RGBA."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.mode not in {"L", "RGB"} or image.has_transparency_data:
        # converted is the square and what the filter reads beside it, not all of a long image
        margin = side // size + 2
        x, y = max(0, left - margin), max(0, top - margin)
        with _own_limit():
            image = image.crop(
                (
                    x,
                    y,
                    min(image.width, left + side + margin),
                    min(image.height, top + side + margin),
                )
            )
        image, left, top = _plain(image), left - x, top - y
    box = (left, top, left + side, top + side)
    if side == size:
        return image if image.width == image.height else image.crop(box)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
