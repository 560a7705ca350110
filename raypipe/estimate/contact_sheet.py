"""A contact sheet: samples of a source as raypipe reads them, with their classes and ids."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from raypipe import storage
from raypipe.errors import ConfigError
from raypipe.estimate.drawn_samples import DrawnSample
from raypipe.estimate.facts import Survey
from raypipe.text import size
from raypipe.vision.decode import BadImage, decode, open_image
from raypipe.vision.own_code import Transform, displayed

MARK = "raypipe contact sheet"
"""Text in the metadata of a sheet, by which it is recognised."""
HEAD_BYTES = 200
"""Bytes within which the mark stands."""
TILE = 160
"""Pixels a side of an image."""
GAP, MARGIN = 14, 24
"""Pixels between two images, and around all of them."""
PIXELATED = 48
"""Images of at most this many pixels a side are enlarged with visible pixels."""
TITLE_SIZE, NAME_SIZE, ID_SIZE = 20, 14, 11
"""Font sizes."""
LINE = ID_SIZE + 4
"""Pixels from one line of a paragraph to the next."""
HEAD, CAPTION = 70, 54
"""Pixels above the first row, and below each image."""
INK, FAINT, PAPER, BLANK, EDGE = "#1a1a1a", "#606060", "#ffffff", "#d9d9d9", "#c8c8c8"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    survey: Survey,
    drawn: Sequence[DrawnSample],
    columns: int = 8,
    rows: int = 8,
    transform: Transform | None = None,
) -> bytes:
    """Return a PNG of the first `columns` times `rows` drawn samples.

    A sample that a run would reject is a grey tile with the reason. `transform` turns images into
    pixels, if `source.transform` is set.
    """
    shown = drawn[: columns * rows]
    lines = -(-len(shown) // columns) if shown else 1
    width = 2 * MARGIN + columns * TILE + (columns - 1) * GAP
    height = HEAD + lines * (TILE + CAPTION + GAP) + MARGIN - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    _Sheet(sheet, survey.bit_depth, transform).draw(survey, shown, columns)
    buffer, marks = io.BytesIO(), PngInfo()
    marks.add_text("Software", MARK)
    sheet.save(buffer, "PNG", pnginfo=marks)
    return buffer.getvalue()


def refuse_other_file(uri: str) -> None:
    """Raise ConfigError if a file exists that is not a contact sheet, which would be lost."""
    try:
        head = storage.read_bytes(uri, 0, HEAD_BYTES)
    except (FileNotFoundError, IsADirectoryError):
        return  # a folder cannot be overwritten
    if MARK.encode() not in head:
        raise ConfigError(
            f"grid: {uri} exists and is not a contact sheet of raypipe; give another name"
        )


class _Sheet:
    """Draws on the image of a sheet."""

    def __init__(self, image: Image.Image, bit_depth: int, transform: Transform | None) -> None:
        self._bit_depth, self._transform = bit_depth, transform
        self._image, self._pen = image, ImageDraw.Draw(image)
        self._title = _font(TITLE_SIZE, bold=True)
        self._name = _font(NAME_SIZE, bold=True)
        self._small = _font(ID_SIZE)

    def draw(self, survey: Survey, shown: Sequence[DrawnSample], columns: int) -> None:
        self._header(survey, len(shown))
        for number, item in enumerate(shown):
            left = MARGIN + number % columns * (TILE + GAP)
            top = HEAD + number // columns * (TILE + CAPTION + GAP)
            self._tile(item, left, top)
            self._caption(item, left, top + TILE)

    def _header(self, survey: Survey, shown: int) -> None:
        room = self._image.width - 2 * MARGIN
        about = "" if survey.counted else "about "
        text = f"{survey.format}, {about}{survey.samples:,} samples, {size(survey.bytes)}; " + (
            "all of them" if shown == survey.samples else f"{shown} of them drawn at random"
        )
        self._pen.text((MARGIN, 16), _fit(survey.uri, self._title, room), INK, self._title)
        self._pen.text((MARGIN, 42), _fit(text, self._small, room), FAINT, self._small)

    def _tile(self, item: DrawnSample, left: int, top: int) -> None:
        image, reason = _tile_image(item, self._bit_depth, self._transform)
        if image is None:
            self._pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), BLANK)
            _paragraph(self._pen, reason, self._small, (left, top))
            return
        self._image.paste(image, (left, top))
        # a frame, so that white images have an edge
        self._pen.rectangle((left - 1, top - 1, left + TILE, top + TILE), None, EDGE)

    def _caption(self, item: DrawnSample, left: int, top: int) -> None:
        label = item.class_name if item.class_name is not None else "no label"
        colour = INK if item.class_name is not None else FAINT
        self._pen.text((left, top + 4), _fit(label, self._name, TILE), colour, self._name)
        for line, part in enumerate(_in_two(item.sample.sample_id, self._small, TILE)):
            self._pen.text((left, top + 23 + 14 * line), part, FAINT, self._small)


def _tile_image(
    item: DrawnSample, bit_depth: int, transform: Transform | None
) -> tuple[Image.Image | None, str]:
    """Return the image as raypipe reads it, TILE pixels square, or why there is none."""
    if item.reason or item.sample.image is None:
        return None, item.reason
    try:
        native = TILE if transform is not None else _native_side(item.sample.image)
        side = native if native <= PIXELATED else TILE
        pixels = displayed(decode(item.sample.image, side, 1 << 40, bit_depth, transform, None))
    except BadImage as error:
        return None, str(error)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if image.width != TILE:
        image = image.resize((TILE, TILE), Image.Resampling.NEAREST)
    return image, ""


def _native_side(image: bytes | np.ndarray) -> int:
    """Return the shorter side in pixels."""
    if isinstance(image, np.ndarray):
        return min(image.shape[:2])
    with open_image(image) as opened:
        return min(opened.size)


def _paragraph(pen: ImageDraw.ImageDraw, text: str, font: Font, corner: tuple[int, int]) -> None:
    """Write a text in lines, in the middle of a tile."""
    room, lines = TILE - 16, [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [_fit(line, font, room) for line in lines if line]
    limit = room // LINE
    if len(lines) > limit:
        lines = [*lines[: limit - 1], _fit(f"{lines[limit - 1]} …", font, room)]
    top = corner[1] + (TILE - len(lines) * LINE) // 2
    for number, line in enumerate(lines):
        left = corner[0] + (TILE - font.getlength(line)) / 2
        pen.text((left, top + number * LINE), line, INK, font)


def _in_two(text: str, font: Font, room: float) -> tuple[str, str]:
    """Split a text into two lines, if possible where a path, file or key ends."""
    if font.getlength(text) <= room:
        return text, ""
    fitting = max(
        length
        for length in range(1, len(text))
        if length == 1 or font.getlength(text[:length]) <= room
    )
    at = max(text.rfind(mark, fitting // 3, fitting) for mark in "/#_-. ") + 1 or fitting
    return text[:at], _fit(text[at:], font, room)


def _fit(text: str, font: Font, room: float) -> str:
    """Leave out the middle of a text longer than `room` pixels: both ends identify an id."""
    if font.getlength(text) <= room:
        return text
    for length in range(len(text) - 1, 0, -1):
        shorter = f"{text[: length - length // 2]}…{text[len(text) - length // 2 :]}"
        if font.getlength(shorter) <= room:
            return shorter
    return "…"


def _font(size: int, bold: bool = False) -> Font:
    """Return DejaVu Sans, which has most alphabets and comes with Matplotlib, or Pillow's font."""
    matplotlib = importlib.util.find_spec("matplotlib")  # not imported
    if matplotlib is not None and matplotlib.origin is not None:
        folder = os.path.join(os.path.dirname(matplotlib.origin), "mpl-data", "fonts", "ttf")
        file = os.path.join(folder, f"DejaVuSans{'-Bold' * bold}.ttf")
        if os.path.exists(file):
            return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)
