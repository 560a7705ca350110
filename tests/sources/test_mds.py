from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bad_inputs import mds_index, mds_shard_bytes
from source_helpers import ids, make, picture, rejects, samples, scans

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.estimate import inspect_source, sampling

ENCODINGS = {"image": "png", "label": "int", "uid": "str"}


def rows(count: int, start: int = 0) -> list[dict[str, bytes]]:
    return [
        {"image": picture(row), "label": struct.pack("<q", row % 3), "uid": b"u%d" % row}
        for row in range(start, start + count)
    ]


def shard(count: int, start: int = 0) -> bytes:
    return mds_shard_bytes(rows(count, start), ENCODINGS)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def snappy(data: bytes) -> bytes:
    return pa.Codec("snappy").compress(data, asbytes=True)


def write(folder: str, **shards: bytes) -> None:
    for name, content in shards.items():
        storage.write_bytes(f"{folder}/{name}.mds", content)
    names = [(f"{name}.mds", 0) for name in shards]
    storage.write_bytes(f"{folder}/index.json", mds_index(*names))


def test_samples_of_two_shards(place: str) -> None:
    write(f"{place}/set", a=shard(5), b=shard(3, 5))
    storage.write_bytes(f"{place}/set/c.mds", b"a shard that is still being written")
    source = make(f"{place}/set", fragment_samples=2)
    found = samples(source, lambda sample_id: sample_id != "a.mds#1")
    assert ids(found) == [f"a.mds#{row}" for row in (0, 2, 3, 4)] + [
        f"b.mds#{row}" for row in range(3)
    ]
    assert [sample.image for sample in found] == [picture(row) for row in (0, 2, 3, 4, 5, 6, 7)]
    assert [sample.label for sample in found] == [0, 2, 0, 1, 2, 0, 1] and not rejects(found)
    assert ids(samples(make(f"{place}/set", id_column="uid")))[:2] == ["u0", "u1"]


@pytest.mark.parametrize(
    ("ending", "pack"),
    [("zstd", zstd), ("gz", gzip.compress), ("bz2", bz2.compress), ("snappy", snappy)],
)
def test_compressed_shards(tmp_path: Any, ending: str, pack: Any) -> None:
    storage.write_bytes(f"{tmp_path}/a.mds.{ending}", pack(shard(4)))
    storage.write_bytes(f"{tmp_path}/b.mds", shard(2, 4))  # of this one only the raw shard is left
    index = json.loads(mds_index(("a.mds", 4), ("b.mds", 2)))
    for entry in index["shards"]:
        entry["zip_data"] = {"basename": f"{entry['raw_data']['basename']}.{ending}"}
    storage.write_json(f"{tmp_path}/index.json", index)
    found = samples(make(str(tmp_path), fragment_samples=3))
    assert ids(found) == [f"a.mds.{ending}#{row}" for row in range(4)] + ["b.mds#0", "b.mds#1"]
    assert [sample.image for sample in found] == [picture(row) for row in range(6)]
    storage.write_bytes(f"{tmp_path}/a.mds.{ending}", pack(shard(4))[:-60])
    (fragment,) = scans(make(str(tmp_path)))[0].fragments
    assert fragment.error.startswith("not a readable MDS shard: ")


def test_an_index_that_names_a_missing_shard(tmp_path: Any) -> None:
    write(str(tmp_path), a=shard(2))
    storage.write_bytes(f"{tmp_path}/index.json", mds_index(("a.mds", 2), ("b.mds", 2)))
    scanned = scans(make(str(tmp_path)))
    assert scanned[1].fragments[0].error == "no such file, although index.json lists it"
    assert scanned[0].fragments[0].samples == 2


def test_folders_of_shards(tmp_path: Any) -> None:
    write(f"{tmp_path}/x", a=shard(1))
    write(f"{tmp_path}/y", a=shard(1, 1))
    assert ids(samples(make(str(tmp_path)))) == ["x/a.mds#0", "y/a.mds#0"]
    assert ids(samples(make(str(tmp_path), include="y/*"))) == ["y/a.mds#0"]
    # the index of a merged dataset lists the shards of its folders, which keep their own
    storage.write_bytes(f"{tmp_path}/index.json", mds_index(("x/a.mds", 1), ("y/a.mds", 1)))
    assert ids(samples(make(str(tmp_path)))) == ["x/a.mds#0", "y/a.mds#0"]
    write(f"{tmp_path}/s/train", a=shard(1))
    write(f"{tmp_path}/s/val", a=shard(1))
    with pytest.raises(SourceError, match=r"several splits: .*source.include to 'train/\*'"):
        list(make(f"{tmp_path}/s").files())


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"", "not valid JSON"),
        (b"{}", "no 'shards'; source.uri must be a folder that MDSWriter wrote"),
        (b'{"shards": [{"format": "json"}]}', "shards of the format json; only mds is read"),
        (mds_index(("../a.mds", 1)), "'../a.mds' is not a path in this folder"),
        (mds_index(("/a.mds", 1)), "'/a.mds' is not a path in this folder"),
        (mds_index(("b.mds", 1)), "none of the 1 shards in index.json exists, such as b.mds"),
        (mds_index(), "index.json lists no shard"),
        (None, "no index.json: the writer of these MDS shards has not finished"),
    ],
)
def test_an_index_that_cannot_be_used(tmp_path: Any, index: bytes | None, words: str) -> None:
    write(str(tmp_path), a=shard(1))
    storage.delete(f"{tmp_path}/index.json")
    if index is not None:
        storage.write_bytes(f"{tmp_path}/index.json", index)
    with pytest.raises(Exception, match=words):
        list(make(str(tmp_path), format="mds").files())


def test_a_shard_that_is_cut_off(tmp_path: Any) -> None:
    whole = shard(4)
    write(str(tmp_path), a=whole[:-100])
    found = samples(make(str(tmp_path)))
    assert len(found) == 4 and list(rejects(found)) == ["a.mds#3"]
    assert found[3].reason.startswith("cut off: the shard has ")
    for content, problem in (
        (whole[:10], "4 samples in 10 bytes"),
        (whole[:60], "its offsets are not in order"),
        (b"\0" * 500, "its offsets are not in order"),
        (b"", "empty: 0 bytes"),
    ):
        write(str(tmp_path), a=content)
        (fragment,) = scans(make(str(tmp_path)))[0].fragments
        assert fragment.error.removeprefix("not a readable MDS shard: ") == problem
    write(str(tmp_path), a=whole)
    source = make(str(tmp_path))
    (fragment,) = scans(source)[0].fragments
    write(str(tmp_path), a=shard(3))
    reason = "the shard has fewer samples than when it was indexed"
    assert rejects(list(source.read(fragment))) == {"a.mds#3": reason}


@pytest.mark.parametrize(
    ("encodings", "settings", "words"),
    [
        ({"photo": "pkl", "label": "int"}, {}, "column 'photo' is encoded as pkl, which is not"),
        ({"thing": "pkl", "label": "int"}, {}, "no column is clearly the image"),
        (
            {"image": "pkl", "label": "int"},
            {"image_column": "image"},
            "encoded as pkl, which is not",
        ),
        ({"a": "png", "b": "jpeg", "label": "int"}, {}, "several columns may hold images"),
        ({"image": "png", "p": "int", "q": "int"}, {}, "several columns may hold labels"),
        (
            {"image": "png"},
            {"label_column": "class"},
            "there is no column 'class'; columns are image",
        ),
    ],
)
def test_columns(tmp_path: Any, encodings: Any, settings: Any, words: str) -> None:
    write(str(tmp_path), a=mds_shard_bytes([dict.fromkeys(encodings, b"\0" * 8)], encodings))
    (fragment,) = scans(make(str(tmp_path), **settings))[0].fragments
    assert words in fragment.error and "set source." in fragment.error


def test_preview(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WHOLE_BYTES", 0)
    write(str(tmp_path), a=shard(60))
    found = inspect_source(make(str(tmp_path)).settings, samples=10)
    assert (found.survey.format, found.survey.samples) == ("mds", 60)


@pytest.mark.skipif(importlib.util.find_spec("streaming") is None, reason="needs streaming")
def test_shards_of_the_package_itself(tmp_path: Any) -> None:
    from PIL import Image
    from streaming import MDSWriter

    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    kinds = ("png", "pil", "ndarray", "ndarray:uint8", "ndarray:uint8:5,4,3")
    for compression in (None, "zstd", "gz", "bz2", "br", "snappy"):
        for number, kind in enumerate(kinds):
            folder = f"{tmp_path}/{compression}-{number}"
            columns = {"image": kind, "label": "int", "name": "str"}
            with MDSWriter(
                out=folder, columns=columns, compression=compression, size_limit=600
            ) as writer:
                for row, image in enumerate(pixels):
                    value = image if "ndarray" in kind else Image.fromarray(image)
                    writer.write({"image": value, "label": row % 3, "name": "x"})
            found = samples(make(folder))
            assert len(found) == 6 and [sample.label for sample in found] == [0, 1, 2] * 2
            if kind != "png":
                np.testing.assert_array_equal([sample.image for sample in found], pixels)


def test_a_folder_without_its_index_is_missed(tmp_path: Any) -> None:
    write(f"{tmp_path}/a", s=shard(2))
    storage.write_bytes(f"{tmp_path}/b/s.mds", shard(2))
    with pytest.raises(SourceError, match=r"lists the shards in the folder of b/s\.mds"):
        scans(make(str(tmp_path)))
    assert len(ids(samples(make(str(tmp_path), include="a/*")))) == 2


def test_a_glob_names_shards_without_an_index(tmp_path: Any) -> None:
    storage.write_bytes(f"{tmp_path}/b/s.mds", shard(2))
    assert len(ids(samples(make(f"{tmp_path}/b/*.mds")))) == 2
