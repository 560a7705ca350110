"""Decode encoded images to pixels. A defect becomes a `BadImage`; its message goes to `rejects/`.

The result is always RGB, uint8, square. Other kinds of images are converted:

- Greyscale of any depth: three equal channels. Bilevel: black and white. Palette: its colours.
- 16 bits per channel (PNG, TIFF): the high byte; of greyscale images, the upper 8 of `bit_depth`
  bits. 32-bit and floating-point pixels are refused.
- CMYK and YCCK, Lab and YCbCr: converted without their profiles. CMYK in a JPEG is taken to be
  inverted, as Adobe writes it, with or without Adobe's marker.
- Transparency (alpha, of a palette, the colour key of 8-bit images): laid over white. Colour keys
  of other depths are ignored.
- Several frames or pictures (GIF, WebP, APNG, TIFF, MPO): the first. For an APNG this is what a
  viewer without animation shows.
- Text, colour profiles and other metadata of a PNG, of any size or damaged: ignored.
- EXIF orientation: applied, wherever in the file it is stored.

A JPEG much larger than the requested size is decoded at 1/2, 1/4 or 1/8 scale, as long as its
shorter side keeps at least `DRAFT_FACTOR` times that size, and resized from there. Compared with
decoding at full scale and resizing with antialiasing (bilinear), on 192 ImageNet photographs of
106 to 1200 pixels, the difference in levels of 255 is

    size   mean    worst image's mean   largest
      32   2.4     6.8                  66
      64   1.5     5.3                  57
     128   0.09    2.0                  39
     224   0.01    0.4                   7

Memory: at most `BYTES_PER_PIXEL` for each pixel of the image, whatever its shape and mode, in
addition to the encoded bytes and the result. A lossless WebP takes the most, an RGB image 4
bytes, a JPEG decoded at 1/8 scale next to nothing. So `max_pixels` bounds the memory. For a long
image only the central square is converted.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from raypipe.errors import RaypipeError
from raypipe.plugins import failure
from raypipe.text import error_text, stand_in
from raypipe.vision.own_code import Transform
from raypipe.vision.png import without_metadata

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted formats. Pillow's others are excluded: some of them run other programs (PostScript)."""

DRAFT_FACTOR = 1.75
"""A JPEG is decoded at reduced scale if this many times the requested size remain.

At 64 pixels, 1.5 differs by 1.7 instead of 1.5 levels (worst image 7.5 instead of 5.3) and is no
faster; 1 is a tenth faster and differs by 3.6; 2 is a twentieth slower and differs by 1.3.
"""
BYTES_PER_PIXEL = 20
"""Upper bound of the memory that decoding takes; see the module docstring."""

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

# Pillow warns about everything it repairs in a damaged file (palette, EXIF, TIFF tags). With a
# million images the warnings would flood the log.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")


class BadImage(RaypipeError):
    """An image that cannot be used. The message is the reject reason."""


class EncodedSample(Protocol):
    """The part of a sample that `decode_batch` needs; `raypipe.sources.RawSample` has it."""

    @property
    def image(self) -> bytes | np.ndarray | None: ...

    @property
    def reason(self) -> str: ...


def decode(
    image: bytes | np.ndarray,
    size: int,
    max_pixels: int,
    bit_depth: int = 16,
    transform: Transform | None = None,
    channels: int | None = 3,
) -> np.ndarray:
    """Return the pixels of one image, uint8 [channels, size, size].

    The shorter side is resized to `size` (antialiased bilinear; smaller images are enlarged),
    then the centre is cropped. An image whose shorter side already has `size` pixels is not
    resampled. Any shape from 1x1 upwards works.

    Parameters
    ----------
    image : bytes or np.ndarray
        Encoded bytes, or uint8 [height, width], [height, width, 1] or [height, width, 3].
    size : int
        Side of the result in pixels.
    max_pixels : int
        An image whose header states more pixels is refused before it is decoded.
    bit_depth : int
        Bits that 16-bit greyscale images use, 8 to 16 (`source.bit_depth`). A larger value is
        refused.
    transform : Transform, optional
        The user's own way from the image to its pixels, before they are resized.
    channels : int, optional
        Channels of the result. Other than 1 and 3 come from a transform or an array. None: as many
        as the transform or the array has, otherwise 3.

    Raises
    ------
    BadImage
        Whatever is wrong with the bytes, or what the transform raises.
    ConfigError
        If the transform does not return pixels.
    """
    if transform is not None:
        transformed = _transformed(image, max_pixels, transform, channels)
        return _square_channels(transformed, size, channels)
    if isinstance(image, np.ndarray) and channels != 3 and _is_stack(image, channels):
        return _square_channels(_checked_array(image, max_pixels), size, channels)
    opened: Image.Image
    try:
        opened = _from_array(image) if isinstance(image, np.ndarray) else open_image(image)
        width, height = opened.size
        if width * height > max_pixels:
            raise BadImage(f"{width}x{height} pixels are more than max_pixels = {max_pixels}")
        if width < 1 or height < 1:
            raise BadImage(f"no pixels: {width}x{height}")
        draft_size = int(DRAFT_FACTOR * size)
        opened.draft(None, (draft_size, draft_size))  # has an effect on JPEGs only
        opened.load()
        orientation = _orientation(opened)  # after loading: a PNG can store it after its pixels
        pixels = _over_white(_square(opened, size, bit_depth))
        if orientation in _ORIENTATIONS:
            pixels = pixels.transpose(_ORIENTATIONS[orientation])
        if channels in (3, None):
            return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))
        return _square_channels(np.asarray(pixels.convert("L")), size, channels)
    except BadImage:
        raise
    except UnidentifiedImageError:
        reason = stand_in(image[:64]) if isinstance(image, bytes) else ""
        raise BadImage(reason or "not a readable JPEG, PNG, WebP, GIF, BMP or TIFF image") from None
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Exception as error:
        # for damaged bytes Pillow's decoders raise nearly anything: OSError, SyntaxError,
        # ValueError, struct.error, IndexError
        raise BadImage(f"cannot be decoded: {error_text(error, 200)}") from None


def decode_batch(
    samples: Iterable[EncodedSample],
    size: int,
    max_pixels: int,
    count: int | None = None,
    bit_depth: int = 16,
    transform: Transform | None = None,
    channels: int = 3,
) -> tuple[np.ndarray, list[str]]:
    """Decode many samples; see `decode_sizes`.

    Returns
    -------
    pixels : np.ndarray
        uint8 [n, channels, size, size]; zero where a sample has no usable image.
    reasons : list[str]
        For each sample "" or the reason why it has no pixels.
    """
    (pixels,), reasons = decode_sizes(
        samples, [size], max_pixels, count, bit_depth, transform, channels
    )
    return pixels, reasons


def decode_sizes(
    samples: Iterable[EncodedSample],
    sizes: Sequence[int],
    max_pixels: int,
    count: int | None = None,
    bit_depth: int = 16,
    transform: Transform | None = None,
    channels: int = 3,
) -> tuple[list[np.ndarray], list[str]]:
    """Decode many samples, each to several sizes.

    Parameters
    ----------
    samples : Iterable[EncodedSample]
        Taken one by one: what a generator reads need not be in memory all at once.
    sizes : Sequence[int]
        Sides of the results in pixels.
    max_pixels, bit_depth, transform, channels
        As for `decode`.
    count : int, optional
        Number of samples. Needed if `samples` has no length.

    Returns
    -------
    pixels : list of np.ndarray
        For each size, uint8 [n, channels, size, size]; zero where a sample has no usable image.
    reasons : list[str]
        For each sample "" or the reason why it has no pixels of one of the sizes.
    """
    if count is None:
        samples = list(samples)
        count = len(samples)
    pixels = [np.zeros((count, channels, size, size), np.uint8) for size in sizes]
    reasons: list[str] = []
    for position, sample in enumerate(samples):
        reason = sample.reason or ("" if sample.image is not None else "no image")
        if not reason and sample.image is not None:
            try:
                decoded = [
                    decode(sample.image, size, max_pixels, bit_depth, transform, channels)
                    for size in sizes
                ]
                for array, image in zip(pixels, decoded, strict=True):
                    array[position] = image
            except BadImage as error:
                reason = str(error)
        reasons.append(reason)
    return pixels, reasons


def _transformed(
    image: bytes | np.ndarray, max_pixels: int, transform: Transform, channels: int | None
) -> np.ndarray:
    """Return what a transform makes of an image, which it gets upright and as a copy."""
    given: Any = image.copy() if isinstance(image, np.ndarray) else image
    try:
        if isinstance(image, bytes):
            with contextlib.suppress(UnidentifiedImageError):
                opened = open_image(image)
                if opened.width * opened.height > max_pixels:
                    raise BadImage(
                        f"{opened.width}x{opened.height} pixels are more than max_pixels = "
                        f"{max_pixels}"
                    )
                opened.load()
                given = ImageOps.exif_transpose(opened)
        return transform(given, channels)
    except RaypipeError:
        raise
    except Exception as error:
        raise BadImage(f"source.transform: {failure(error)}") from None


def _is_stack(array: np.ndarray, channels: int | None) -> bool:
    """Return whether an array is read channel by channel, not as an image of red, green, blue."""
    found = array.shape[2] if array.ndim == 3 else 1
    return found not in (1, 3) if channels in (None, 1) else True


def _checked_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.size == 0:
        raise BadImage(
            f"pixels are {array.dtype} {list(array.shape)}, not uint8 [height, width, c]"
        )
    if array.shape[0] * array.shape[1] > max_pixels:
        raise BadImage(
            f"{array.shape[1]}x{array.shape[0]} pixels are more than max_pixels = {max_pixels}"
        )
    return array


def _square_channels(pixels: np.ndarray, size: int, channels: int | None) -> np.ndarray:
    """Return the central square, resized channel by channel, uint8 [channels, size, size]."""
    layers = pixels[..., None] if pixels.ndim == 2 else pixels
    if layers.shape[2] == 1 and channels == 3:
        layers = np.repeat(layers, 3, 2)
    if channels is not None and layers.shape[2] != channels:
        raise BadImage(
            f"pixels have {layers.shape[2]} channels, but proxy.channels is {channels}; set "
            "source.transform, or proxy.channels"
        )
    squares = [
        np.asarray(_square(Image.fromarray(np.ascontiguousarray(layer)), size, 16))
        for layer in layers.transpose(2, 0, 1)
    ]
    return np.stack(squares)


def jpeg_pixels(data: bytes, max_pixels: int) -> int:
    """Return the number of pixels of a plain JPEG, or 0 for any other data.

    All decoders agree on plain JPEGs: complete up to the end marker, a single picture, greyscale or
    YCbCr, upright, with at most `max_pixels`. Only the header is read.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return 0
    try:
        image = open_image(data)
        count = image.width * image.height
        plain = (
            image.format == "JPEG"
            and (image.mode == "L" or (image.mode == "RGB" and not _stored_as_rgb(image)))
            and 0 < count <= max_pixels
            and _orientation(image) not in _ORIENTATIONS
        )
    except Exception:
        return 0  # `decode` reports what is wrong
    return count if plain else 0


def _stored_as_rgb(jpeg: Image.Image) -> bool:
    """Whether a JPEG stores RGB channels instead of YCbCr."""
    layers = [layer[0] for layer in getattr(jpeg, "layer", ())]
    return jpeg.info.get("adobe_transform") == 0 or layers == [*b"RGB"]


def encode_thumbnail(pixels: np.ndarray, quality: int = 88) -> bytes:
    """Return uint8 [3, height, width] as a JPEG, for reports."""
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


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open an encoded image without decoding it. Raises BadImage, and whatever Pillow raises."""
    if not data:
        raise BadImage("empty: 0 bytes")
    with _own_limit():
        image = Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS)
    # decode in one piece: in several pieces, parts of a JPEG are scanned twice
    image.decodermaxblock = max(ImageFile.MAXBLOCK, len(data))
    return image


@contextlib.contextmanager
def _own_limit() -> Iterator[None]:
    """Lift Pillow's pixel limit, which applies to the whole process.

    Our limit is the caller's `max_pixels` and is checked before decoding.
    """
    with _limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    if not image.info.get("exif"):  # always so for a TIFF: Pillow rotates it while loading
        return 1
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1  # damaged EXIF says nothing about the pixels


def _plain(image: Image.Image, bit_depth: int) -> Image.Image:
    """Return the image as L, RGB or RGBA, the modes that can be resized faithfully."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("32-bit pixels are not supported")
        if values.max() >= 1 << bit_depth:
            bits = int(values.max()).bit_length()
            raise BadImage(
                f"a value takes {bits} bits, but source.bit_depth is {bit_depth}; set it to {bits}"
            )
        return Image.fromarray((values >> (bit_depth - 8)).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("floating-point pixels are not supported")
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in {"1", "L"} else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _square(image: Image.Image, size: int, bit_depth: int) -> Image.Image:
    """Return the central square, resized, as L, RGB or RGBA."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.mode not in {"L", "RGB"} or image.has_transparency_data:
        # convert only the square and the pixels next to it that the filter reads
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
        image, left, top = _plain(image, bit_depth), left - x, top - y
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
