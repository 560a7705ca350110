"""A contact sheet: samples of a source as raypipe reads them, each with its class and its id."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raypipe.estimate.facts import Survey
from raypipe.estimate.inspect import DrawnSamples
from raypipe.text import size
from raypipe.vision.decode import BadImage, decode

TILE, GAP, MARGIN = 160, 14, 24
"""Pixels: side of an image, space between two, space around all."""
PIXELATED = 48
"""Images of at most so many pixels a side are enlarged with their pixels visible."""
TITLE_SIZE, NAME_SIZE, ID_SIZE = 20, 14, 11
HEAD, CAPTION = 70, 54
"""Pixels above the first row, and below each image."""
INK, FAINT, PAPER, BLANK, EDGE = "#1a1a1a", "#606060", "#ffffff", "#d9d9d9", "#c8c8c8"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    survey: Survey, drawn: Sequence[DrawnSamples], columns: int = 8, rows: int = 8
) -> bytes:
    """A PNG of the first `columns` times `rows` drawn samples. One that would be rejected is a grey tile with the reason."""
    shown = drawn[: columns * rows]
    lines = -(-len(shown) // columns) if shown else 1
    width = 2 * MARGIN + columns * TILE + (columns - 1) * GAP
    height = HEAD + lines * (TILE + CAPTION + GAP) + MARGIN - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    title, name, small = _font(TITLE_SIZE, bold=True), _font(NAME_SIZE, bold=True), _font(ID_SIZE)
    pen.text((MARGIN, 16), _fit(survey.uri, title, width - 2 * MARGIN), INK, title)
    about = "" if survey.counted else "about "
    words = f"{survey.format}, {about}{survey.samples:,} samples, {size(survey.bytes)}; {len(shown)} of them drawn at random"
    pen.text((MARGIN, 42), _fit(words, small, width - 2 * MARGIN), FAINT, small)
    for number, item in enumerate(shown):
        left = MARGIN + number % columns * (TILE + GAP)
        top = HEAD + number // columns * (TILE + CAPTION + GAP)
        image, reason = _tile(item, survey)
        if image is None:
            pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), BLANK)
            _paragraph(pen, reason, small, (left, top))
        else:
            sheet.paste(image, (left, top))
            pen.rectangle(
                (left - 1, top - 1, left + TILE, top + TILE), None, EDGE
            )  # a white image ends somewhere
        label = item.class_name if item.class_name is not None else "no label"
        pen.text(
            (left, top + TILE + 4),
            _fit(label, name, TILE),
            INK if item.class_name is not None else FAINT,
            name,
        )
        for line, part in enumerate(_in_two(item.sample.sample_id, small, TILE)):
            pen.text((left, top + TILE + 23 + 14 * line), part, FAINT, small)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _tile(item: DrawnSamples, survey: Survey) -> tuple[Image.Image | None, str]:
    """The image as raypipe reads it, TILE pixels square, or why there is none."""
    if item.reason or item.sample.image is None:
        return None, item.reason
    try:
        native = _native_side(item.sample.image)
        pixels = decode(item.sample.image, native if native <= PIXELATED else TILE, 1 << 40)
    except BadImage as error:
        return None, str(error)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return image if image.width == TILE else image.resize(
        (TILE, TILE), Image.Resampling.NEAREST
    ), ""


def _native_side(image: bytes | np.ndarray) -> int:
    """The shorter side, pixels."""
    if isinstance(image, np.ndarray):
        return min(image.shape[:2])
    with Image.open(io.BytesIO(image)) as opened:
        return min(opened.size)


def _paragraph(pen: ImageDraw.ImageDraw, words: str, font: Font, corner: tuple[int, int]) -> None:
    """Words in lines, in the middle of a tile."""
    room, lines = TILE - 16, [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [_fit(line, font, room) for line in lines if line]
    most = (TILE - 16) // (ID_SIZE + 4)
    if len(lines) > most:
        lines = [*lines[: most - 1], _fit(f"{lines[most - 1]} …", font, room)]
    top = corner[1] + (TILE - len(lines) * (ID_SIZE + 4)) // 2
    for number, line in enumerate(lines):
        left = corner[0] + (TILE - font.getlength(line)) / 2
        pen.text((left, top + number * (ID_SIZE + 4)), line, INK, font)


def _in_two(words: str, font: Font, room: float) -> tuple[str, str]:
    """The words in two lines; the first ends where a path, file or key does, if it can."""
    if font.getlength(words) <= room:
        return words, ""
    most = max(
        kept for kept in range(1, len(words)) if kept == 1 or font.getlength(words[:kept]) <= room
    )
    at = max(words.rfind(mark, most // 3, most) for mark in "/#_-. ") + 1 or most
    return words[:at], _fit(words[at:], font, room)


def _fit(words: str, font: Font, room: float) -> str:
    """The words, with their middle left out where they are longer than so many pixels: both ends of an id tell it apart."""
    if font.getlength(words) <= room:
        return words
    for kept in range(len(words) - 1, 0, -1):
        shorter = f"{words[: kept - kept // 2]}…{words[len(words) - kept // 2 :]}"
        if font.getlength(shorter) <= room:
            return shorter
    return "…"


def _font(size: int, bold: bool = False) -> Font:
    """DejaVu Sans, which knows most alphabets and comes with matplotlib; else Pillow's own."""
    found = importlib.util.find_spec("matplotlib")  # finds it without importing it
    if found is not None and found.origin is not None:
        file = os.path.join(
            os.path.dirname(found.origin),
            "mpl-data",
            "fonts",
            "ttf",
            f"DejaVuSans{'-Bold' * bold}.ttf",
        )
        if os.path.exists(file):
            return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)
