"""What the images among the drawn samples state before they are decoded."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from raypipe.estimate.facts import ImageFacts
from raypipe.sources import RawSample
from raypipe.vision.decode import open_image

_MODES = {
    "1": "black and white",
    "L": "greyscale",
    "P": "palette",
    "LA": "greyscale with transparency",
    "RGBA": "RGB with transparency",
}


def image_facts(samples: Sequence[RawSample]) -> ImageFacts | None:
    """Return what the headers of the images state; None if none can be read."""
    headers = [header for header in map(_header, samples) if header is not None]
    if not headers:
        return None
    stored = sorted(header.bytes for header in headers if header.bytes is not None)
    by_area = sorted(headers, key=lambda header: (header.width * header.height, header.width))
    return ImageFacts(
        read=len(headers),
        bytes_median=stored[len(stored) // 2] if stored else None,
        bytes_p95=stored[math.ceil(0.95 * len(stored)) - 1] if stored else None,
        smallest=by_area[0][:2],
        median=(
            round(statistics.median(header.width for header in headers)),
            round(statistics.median(header.height for header in headers)),
        ),
        largest=by_area[-1][:2],
        formats=_shares(header.format for header in headers),
        modes=_shares(header.mode for header in headers),
    )


class _ImageHeader(NamedTuple):
    """What an image states before it is decoded; no bytes if pixels are stored without encoding."""

    width: int
    height: int
    format: str
    mode: str
    bytes: int | None


def _header(sample: RawSample) -> _ImageHeader | None:
    image = sample.image
    if image is None:
        return None
    if not isinstance(image, bytes):
        mode = "RGB" if image.ndim == 3 and image.shape[2] == 3 else "greyscale"
        return _ImageHeader(image.shape[1], image.shape[0], "pixels", mode, None)
    try:
        with open_image(image) as opened:
            mode = (
                "16-bit greyscale"
                if opened.mode.startswith("I")
                else _MODES.get(opened.mode, opened.mode)
            )
            return _ImageHeader(*opened.size, opened.format or "unknown", mode, len(image))
    except Exception:  # Pillow raises nearly anything; decoding reports what is wrong
        return None


def _shares(values: Iterable[str]) -> dict[str, float]:
    counts = Counter(values)
    return {name: count / counts.total() for name, count in counts.most_common()}
