"""With `source.label_column: null` no format reads labels: missing or bad ones are no error."""

from __future__ import annotations

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_helpers import make, picture, samples, scans

from raypipe.distributed.ray_data.copy import _columns
from raypipe.errors import SourceError

IMAGES = [picture(number) for number in range(4)]


def checked(source) -> list[str]:
    """Ids of a source, after checking that it has four readable samples and no labels."""
    found = samples(source)
    assert [sample.image for sample in found] == IMAGES
    assert {(sample.label, sample.reason) for sample in found} == {(None, "")}
    assert all(scan.class_names is None and not scan.labels for scan in scans(source))
    return [sample.sample_id for sample in found]


@pytest.mark.parametrize(
    "columns",
    [{}, {"label": [3, 1, None, 7]}, {"label": [[1], [2], [], [3]], "kind": ["a", "b", "c", "d"]}],
)
def test_parquet(tmp_path, columns: dict) -> None:
    pq.write_table(pa.table({"image": IMAGES, **columns}), tmp_path / "x.parquet")
    assert checked(make(str(tmp_path), label_column=None)) == [
        f"x.parquet#{row}" for row in range(4)
    ]
    settled = make(str(tmp_path), label_column=None).resolved_settings()
    assert (settled.image_column, settled.label_column) == ("image", None)


def test_a_look_into_parquet(tmp_path) -> None:
    import random

    pq.write_table(pa.table({"image": IMAGES, "label": [[1]] * 4}), tmp_path / "x.parquet")
    source = make(str(tmp_path), label_column=None)
    (file,) = source.files()
    for whole in (True, False):
        seen = source.preview(file, 2, 2, random.Random(0), whole)
        assert (seen.error, dict(seen.labels), seen.class_names) == ("", {None: 4}, None)
        assert seen.drawn and all(
            sample.label is None and not sample.reason for sample in seen.drawn
        )


def test_webdataset(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, image in enumerate(IMAGES):
            for ending, content in (("png", image), ("cls", b"\xff\xfe")):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    assert {sample.reason[:5] for sample in samples(make(str(tmp_path)))} == {"label"}
    assert checked(make(str(tmp_path), label_column=None)) == [
        f"a.tar#{number}" for number in range(4)
    ]


@pytest.mark.parametrize(
    "listed",
    [
        "path,kind\n{0},x\n{1},y\n{2},\n{3},z\n",
        "{0}\n{1}\n{2}\n{3}\n",
        "{0} 3\n{1} cat\n{2}\n{3} 1\n",
        "{0},3\n{1},4\n{2},\n{3},1\n",
    ],
)
def test_file_list(tmp_path, listed: str) -> None:
    names = [f"deep/{number}.png" for number in range(4)]
    (tmp_path / "deep").mkdir()
    for name, image in zip(names, IMAGES, strict=True):
        (tmp_path / name).write_bytes(image)
    ending = "csv" if "," in listed else "txt"
    (tmp_path / f"list.{ending}").write_text(listed.format(*names))
    (tmp_path / "classes.txt").write_text("nothing of it\n")
    source = make(
        f"{tmp_path}/list.{ending}",
        format="filelist",
        root=str(tmp_path),
        label_column=None,
        class_map=f"{tmp_path}/classes.txt",
    )
    assert checked(source) == names


def test_image_folder(tmp_path) -> None:
    names = ["cat/0.png", "cat/1.png", "dog/2.png", "loose.png"]
    for name, image in zip(names, IMAGES, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image)
    (tmp_path / "map.json").write_text('{"horse": 0}')
    with pytest.raises(SourceError, match="class map"):
        samples(make(str(tmp_path), class_map=f"{tmp_path}/map.json"))
    source = make(str(tmp_path), label_column=None, class_map=f"{tmp_path}/map.json")
    assert checked(source) == names
    (file,) = source.files()
    assert source.listed_labels(file) == {None: 4}


def test_a_dataset_of_ray_data() -> None:
    import pandas as pd

    block = pd.DataFrame({"image": IMAGES, "label": [None, {}, 3, "x"]})
    assert _columns(block, "image", None, None)["label"].to_pylist() == ["null"] * 4
    with pytest.raises(SourceError, match="column 'label' holds values of several types"):
        _columns(block, "image", "label", None)
