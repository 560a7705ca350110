"""Images of 16 bits that use fewer, such as those of a 12-bit camera or of a scanner.

The high byte of a 12-bit value has only 4 bits, so 16 of 256 levels would remain. The setting
`source.bit_depth` scales greyscale images by the bits in use; Pillow reads only the high byte of
colour images. Nothing is scaled by default, since a value has to give the same pixel in all images.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from raypipe.vision.decode import open_image

CHECKED = 8
"""Images of 16 bits that are checked in each fragment of the seed set."""
_BITS_PER_SAMPLE = 258  # TIFF tag


@dataclasses.dataclass(frozen=True)
class BitsInUse:
    """Bits that the checked 16-bit images use.

    Attributes
    ----------
    images : int
        Images of 16 bits that were checked.
    bits : int
        Bits of the largest value in any of them.
    colour : bool
        Whether one of them has colours.
    """

    images: int = 0
    bits: int = 0
    colour: bool = False

    def __add__(self, other: BitsInUse) -> BitsInUse:
        return BitsInUse(
            self.images + other.images,
            max(self.bits, other.bits),
            self.colour or other.colour,
        )

    def note(self, bit_depth: int) -> str:
        """Return what `bit_depth` loses and what to do; "" if at least half of the levels remain.

        An image that is a little dark uses one bit less.
        """
        if not self.images or self.bits > bit_depth - 2:
            return ""
        levels = max(1, 2 ** max(0, self.bits - bit_depth + 8))
        advice = (
            "convert the images to 8 bits, because source.bit_depth applies to greyscale only"
            if self.colour
            else f"set source.bit_depth to {max(8, self.bits)}"
        )
        return (
            f"16-bit images use only {self.bits} bits ({self.images:,} checked), so {levels} of "
            f"256 levels remain; {advice}"
        )


def bits_in_use(image: bytes | np.ndarray | None, max_pixels: int) -> BitsInUse:
    """Return the bits that a 16-bit image uses; of anything else, no image."""
    if not isinstance(image, bytes) or not _may_be_deep(image):
        return BitsInUse()
    try:
        opened = open_image(image)
        if opened.width * opened.height > max_pixels:
            return BitsInUse()
        if opened.mode.startswith("I"):
            largest = int(np.asarray(opened).max())
            return BitsInUse(1, largest.bit_length()) if largest < 1 << 16 else BitsInUse()
        if opened.format == "TIFF" and set(opened.tag_v2.get(_BITS_PER_SAMPLE, ())) != {16}:  # type: ignore[attr-defined]
            return BitsInUse()
        high = int(np.asarray(opened.convert("RGB")).max())
        return BitsInUse(1, 8 + high.bit_length(), True)
    except Exception:
        return BitsInUse()  # decoding reports what is wrong


def _may_be_deep(data: bytes) -> bool:
    """Whether the first bytes are those of a 16-bit PNG, or of a TIFF."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[24:25] == b"\x10"
    return data.startswith((b"II*\0", b"MM\0*"))
