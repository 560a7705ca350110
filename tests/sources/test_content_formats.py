"""Which files belong to a format, by name or content, and what is left out."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pyarrow as pa
import pytest
import serial
from helpers import QUIET
from PIL import Image
from serial import no_ray
from source_helpers import ids, make, picture, samples

from raypipe import storage
from raypipe.config import SourceSettings, parse_config
from raypipe.errors import SourceError
from raypipe.estimate import inspect_source
from raypipe.estimate.inspect_text import describe_survey
from raypipe.sources import formats
from raypipe.sources.formats import format_of
from raypipe.vision.decode import decode_batch

__all__ = ["no_ray"]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(seed))).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 JPEGs of three classes with usual, unusual and no endings, and 22 other files."""
    names = [f"a/{number:02d}.jpg" for number in range(32)]
    names += [f"a/{number:02d}.jfif" for number in range(20)]
    names += [f"a/{number:02d}.JPE" for number in range(8)]
    names += [f"b/{number:02d}.thumb" for number in range(10)]
    names += [f"c/{number:02d}" for number in range(20)]
    names += [f"c/img.{number:04d}" for number in range(10)]
    for number, name in enumerate(names):
        storage.write_bytes(f"{tmp_path}/data/{name}", jpeg(number))
    for number in range(20):
        storage.write_bytes(f"{tmp_path}/data/a/{number:02d}.txt", b"a caption")
    storage.write_bytes(f"{tmp_path}/data/README", b"about these images")
    storage.write_bytes(f"{tmp_path}/data/b/empty", b"")
    return tmp_path


def test_images_are_found_by_their_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read = storage.read_bytes
    monkeypatch.setattr(
        storage, "read_bytes", lambda uri, *given: opened.append(uri) or read(uri, *given)
    )
    source = make(str(folder / "data"))
    assert source.format == "imagefolder"
    opened.clear()
    assert sum(len(file.members) for file in source.files()) == 100
    assert len(opened) == formats.TRIES + 3  # .txt; .thumb; README and the first without
    monkeypatch.undo()
    found = samples(source)
    assert not [sample for sample in found if sample.reason] and len(found) == 100
    assert [[sample.label for sample in found].count(name) for name in "abc"] == [60, 10, 30]
    assert source.left_out == {".txt": (20, "a/00.txt"), "": (2, "README")}


def test_what_is_left_out_is_said(
    folder: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out = (
        "left out    22 files (not images): 20 .txt (such as a/00.txt), "
        "2 without an ending (such as README)"
    )
    source = SourceSettings(uri=str(folder / "data"))
    survey = inspect_source(source).survey
    assert left_out in list(describe_survey(survey))
    assert survey.as_dict()["left_out"][".txt"] == {"files": 20, "example": "a/00.txt"}
    said: list[str] = []
    monkeypatch.setattr(QUIET, "say", said.append)
    config = parse_config({"run": str(folder / "run"), "source": source.model_dump()})
    assert serial.index(config).detail["left_out"] == {".txt": 20, "": 2}
    assert said == [f"note: {left_out.replace('left out    ', 'left out ')}"]


def test_a_folder_of_files_without_endings(tmp_path: Path) -> None:
    for number in range(3):
        storage.write_bytes(f"{tmp_path}/images/c/{number}", picture(number))
        storage.write_table(
            f"{tmp_path}/tables/part-{number}",
            pa.table({"image": [picture(number)], "label": [number]}),
        )
    assert make(f"{tmp_path}/images").format == "imagefolder"
    tables = tmp_path / "tables"
    (tables / "_metadata").write_bytes((tables / "part-0").read_bytes())
    source = make(str(tables))
    assert source.format == "parquet" and source.left_out == {}
    assert ids(samples(source)) == [f"part-{number}#0" for number in range(3)]


def test_an_archive_of_another_kind_is_left_out_and_named(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/a.tar", bytes(1024))
    storage.write_bytes(f"{tmp_path}/b.tar.zst", b"\x28\xb5\x2f\xfd")
    source = make(str(tmp_path))
    assert [file.path for file in source.files()] == ["a.tar"]
    assert source.left_out == {".zst": (1, "b.tar.zst")}


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (b"\xff\xd8\xff\xe0", "imagefolder"),
        (b"\x89PNG\r\n\x1a\n....", "imagefolder"),
        (b"GIF89a", "imagefolder"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "imagefolder"),
        (b"RIFF\0\0\0\0WAVEfmt ", ""),
        (b"PAR1", "parquet"),
        (bytes(257) + b"ustar\x0000", "webdataset"),
        (b"II*\0", ""),  # a TIFF, and many raw photographs
        (b"BMW is a car", ""),
        (b"", ""),
    ],
)
def test_first_bytes(head: bytes, format: str) -> None:
    assert format_of(head) == format


def test_what_is_stored_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    page = b"<!DOCTYPE html>\n<html>403</html>"
    storage.write_bytes(f"{tmp_path}/images/cat/0.png", pointer)
    storage.write_bytes(f"{tmp_path}/images/cat/1.png", page)
    found = samples(make(f"{tmp_path}/images"))
    reasons = decode_batch(found, 8, 100)[1]
    assert "a Git LFS pointer instead of the file; run `git lfs pull`" in reasons[0]
    assert "an HTML page instead of the file" in reasons[1]
    for ending in ("parquet", "tar"):
        storage.write_bytes(f"{tmp_path}/{ending}/a.{ending}", pointer)
        source = make(f"{tmp_path}/{ending}", format={"tar": "webdataset"}.get(ending, ending))
        (file,) = source.files()
        (fragment,) = source.scan(file).fragments
        assert fragment.error.startswith("a Git LFS pointer")
        problem = source.preview(file, 1, 1, random.Random(0), False).error
        assert problem.startswith("a Git LFS pointer")


def test_a_delta_table_is_refused(place: str) -> None:
    """Its folder also holds the files of earlier versions."""
    table = pa.table({"image": [picture(0)], "label": [0]})
    for number in range(2):
        storage.write_table(f"{place}/set/part-{number}.parquet", table)
    storage.write_bytes(f"{place}/set/_delta_log/0.json", b"{}")
    with pytest.raises(SourceError, match=r"a Delta table \(_delta_log\), .* earlier versions"):
        list(make(f"{place}/set", format="parquet").files())
    assert len(samples(make(f"{place}/set/part-{{0,1}}.parquet"))) == 2
