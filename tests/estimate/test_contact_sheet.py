"""The contact sheet: every tile in its place, nothing cut, rejects in grey with their reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import raypipe
from raypipe.config import SourceSettings
from raypipe.errors import ConfigError
from raypipe.estimate import inspect_source
from raypipe.estimate.contact_sheet import (
    BLANK,
    CAPTION,
    GAP,
    HEAD,
    ID_SIZE,
    MARGIN,
    TILE,
    _fit,
    _font,
    _in_two,
    contact_sheet,
)
from raypipe.estimate.drawn_samples import DrawnSample
from raypipe.sources import RawSample


def _colour(pixels: np.ndarray, number: int, columns: int) -> np.ndarray:
    """Every pixel of a tile: [TILE, TILE, 3]."""
    left, top = (
        MARGIN + number % columns * (TILE + GAP),
        HEAD + number // columns * (TILE + CAPTION + GAP),
    )
    return pixels[top : top + TILE, left : left + TILE]


def test_each_sample_has_its_tile() -> None:
    survey = inspect_source(SourceSettings(uri="digits://"), samples=20).survey
    shades = [
        np.full((40, 60, 3), (number * 20, 255 - number * 20, 90), np.uint8) for number in range(10)
    ]
    drawn = [
        DrawnSample(RawSample(f"a/{number}.png", image, number), "", f"class {number}")
        for number, image in enumerate(shades)
    ]
    drawn.insert(
        3,
        DrawnSample(
            RawSample("broken/" + "x" * 300, None, None, "cut off"),
            "the file is cut off " * 30,
            None,
        ),
    )
    with Image.open(io.BytesIO(contact_sheet(survey, drawn, columns=4, rows=3))) as opened:
        assert opened.format == "PNG"
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels.shape == (
        HEAD + 3 * (TILE + CAPTION + GAP) + MARGIN - GAP,
        2 * MARGIN + 4 * TILE + 3 * GAP,
        3,
    )
    for number, item in enumerate(drawn):
        tile = _colour(pixels, number, 4)
        if item.sample.image is None:
            grey = int(BLANK[1:3], 16)
            assert (
                (tile[:4] == grey).all() and (tile[:, :4] == grey).all() and (tile < 100).any()
            )  # words inside, none at the edge
        else:
            assert (tile == item.sample.image[0, 0]).all()
    assert (pixels[:, : MARGIN - 2] == 255).all() and (
        pixels[:, -(MARGIN - 2) :] == 255
    ).all()  # no words in the margins
    assert (pixels[-GAP:] == 255).all()


@pytest.mark.parametrize(
    "words", ["a", "train-00008-of-00010.parquet#3686", "x" * 500, "a/b/" * 60, "", "日本語" * 40]
)
def test_words_stay_within_their_room(words: str) -> None:
    font = _font(ID_SIZE)
    assert font.getlength(_fit(words, font, TILE)) <= TILE
    lines = _in_two(words, font, TILE)
    assert max(map(font.getlength, lines)) <= TILE
    assert words.startswith(lines[0]) and words.endswith(lines[1].split("…")[-1])


def test_the_numbers_of_a_file_and_a_row_are_kept() -> None:
    assert _in_two("train-00008-of-00010.parquet#3686", _font(ID_SIZE), TILE) == (
        "train-00008-of-00010.",
        "parquet#3686",
    )


def test_a_sheet_replaces_sheets_only(tmp_path: Path) -> None:
    sheet, mine = tmp_path / "sheet.png", tmp_path / "mine.png"
    for _ in range(2):
        raypipe.inspect("digits://", samples=4, grid=str(sheet), cpus=1, gpus=0)
    Image.new("RGB", (8, 8)).save(mine)
    before = mine.read_bytes()
    with pytest.raises(ConfigError, match=r"mine\.png exists and is not a contact sheet"):
        raypipe.inspect("digits://", samples=4, grid=str(mine), cpus=1, gpus=0)
    assert mine.read_bytes() == before
