"""16-bit images that use fewer bits: what is lost, what is said, and `source.bit_depth`."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import serial
from bad_inputs import png_chunk
from helpers import QUIET, small_config
from PIL import Image
from serial import no_ray

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.estimate import inspect_source
from raypipe.estimate.inspect_text import describe_survey
from raypipe.report.summary import _depth_note
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.embed.stage import EmbedStage, _read
from raypipe.stages.seed.stage import SeedStage
from raypipe.vision.bit_depth import BitsInUse, bits_in_use
from raypipe.vision.decode import BadImage, decode

__all__ = ["no_ray"]

NOTE = "16-bit images use only 12 bits ({} checked), so 16 of 256 levels remain; set source.bit_depth to 12"
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
"""Every value of 12 bits."""


def grey(values: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format)
    return buffer.getvalue()


def colour_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which Pillow cannot write."""

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    content = header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_levels_that_remain(format: str) -> None:
    image = grey(RAMP, format)
    assert len(np.unique(decode(image, 64, 10_000))) == 16
    scaled = decode(image, 64, 10_000, 12)
    assert np.array_equal(scaled, np.stack([RAMP >> 4] * 3)) and len(np.unique(scaled)) == 256
    with pytest.raises(
        BadImage, match=r"a value takes 12 bits, but source.bit_depth is 11; set it"
    ):
        decode(image, 64, 10_000, 11)


def test_the_bits_in_use() -> None:
    assert bits_in_use(grey(RAMP), 10_000) == BitsInUse(1, 12)
    assert bits_in_use(grey(RAMP, "TIFF"), 10_000) == BitsInUse(1, 12)
    assert bits_in_use(grey(RAMP * 16), 10_000) == BitsInUse(1, 16)
    assert bits_in_use(grey(RAMP * 0), 10_000) == BitsInUse(1, 0)
    assert bits_in_use(grey(RAMP), 100) == BitsInUse()  # more pixels than max_pixels
    for other in (grey(RAMP.astype(np.uint8)), grey(RAMP.astype(np.uint8), "TIFF"), b"", None):
        assert bits_in_use(other, 10_000) == BitsInUse()
    assert bits_in_use(grey(RAMP)[:100], 10_000) == BitsInUse()
    colour = bits_in_use(colour_png(np.stack([RAMP] * 3, 2)), 10_000)
    assert colour == BitsInUse(1, 12, True)
    assert "convert the images to 8 bits" in colour.note(16)
    assert BitsInUse(1, 11) + BitsInUse(2, 12) == BitsInUse(3, 12)
    assert BitsInUse(3, 12).note(16) == NOTE.format(3)
    assert not any((BitsInUse(3, 15).note(16), BitsInUse(3, 12).note(12), BitsInUse().note(16)))


def test_an_inspection_and_a_run_say_it(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(120):
        path = f"{tmp_path}/data/{'ab'[number % 2]}/{number:03d}.png"
        storage.write_bytes(path, grey(np.roll(RAMP, number)))
    source = SourceSettings(uri=f"{tmp_path}/data")
    assert f"            {NOTE.format(120)}" in list(describe_survey(inspect_source(source).survey))
    scaled = inspect_source(source.model_copy(update={"bit_depth": 12})).survey
    assert scaled.depth_note == "" and scaled.rejects.count == 0
    said: list[str] = []
    monkeypatch.setattr(QUIET, "say", said.append)
    overrides = [f"source.uri={tmp_path}/data", "source.format=imagefolder", "source.limit=null"]
    overrides += ["seed.fraction=0.9", "proxy.image_size=64"]
    levels, fingerprints = [], []
    for depth in (16, 12):
        run = f"{tmp_path}/{depth}"
        config = small_config(run, *overrides, f"source.bit_depth={depth}")
        serial.index(config)
        record = serial.seed(config)
        shard = storage.read_table(Run(run).path("seed", min(Run(run).done("seed")) + ".parquet"))
        image = np.frombuffer(shard["image"][0].as_py(), np.uint8)
        levels.append(len(np.unique(image)))
        (fragment, *_) = Run(run).fragments()
        assert len(np.unique(_read(config, run, False, fragment)["image"][0])) == levels[-1]
        fingerprints.append([stage.settings(config) for stage in (SeedStage(), EmbedStage())])
        note = _depth_note(config, {"seed": record})
        assert (note is None) == (depth == 12)
    assert levels == [16, 256]
    assert fingerprints[0] != fingerprints[1] and "bit_depth" not in fingerprints[0][0]
    assert len(said) == 1 and said[0].startswith("note: 16-bit images use only 12 bits")
    assert _depth_note(config, {"seed": StageRecord()}) is None  # a run of an earlier version
