"""Well-formed files that mean something else than they seem to, in every format that has them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_inputs import example, mds_index, mds_shard_bytes, tfrecord_bytes
from serial import index, no_ray
from source_helpers import ids, make, picture, rejects, samples, scans

import raypipe
from raypipe.config import parse_config
from raypipe.errors import SourceError
from raypipe.estimate.inspect_text import describe_survey
from raypipe.sources.classes import names_note, sparse_classes_note
from raypipe.sources.formats import copied_name

__all__ = ["no_ray"]

IMAGE = picture(0)
Sample = dict[str, Any]
"""Field -> value: image, label, split, ..."""


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[Sample]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


def write_tfrecord(path: Path, rows: list[Sample]) -> None:
    path.with_suffix(".tfrecord").write_bytes(tfrecord_bytes([example(row) for row in rows]))


def write_mds(path: Path, rows: list[Sample]) -> None:
    encoded = [
        {
            key: value.encode() if isinstance(value, str) else value
            for key, value in (
                (key, struct.pack("<q", v) if isinstance(v, int) else v) for key, v in row.items()
            )
        }
        for row in rows
    ]
    kinds = {bytes: "png", int: "int", str: "str"}
    encodings = {key: kinds[type(value)] for key, value in rows[0].items()}
    path.with_suffix(".mds").write_bytes(mds_shard_bytes(encoded, encodings))
    names = sorted(file.name for file in path.parent.glob("*.mds"))
    (path.parent / "index.json").write_bytes(mds_index(*((name, len(rows)) for name in names)))


def write_tar(path: Path, rows: list[Sample]) -> None:
    members: dict[str, bytes] = {}
    for number, row in enumerate(rows):
        fields = {key: value for key, value in row.items() if key != "image"}
        members[f"{number}.png"] = row["image"]
        members[f"{number}.json"] = json.dumps(fields).encode()
    path.with_suffix(".tar").write_bytes(tar(members))


WRITERS: dict[str, Callable[[Path, list[Sample]], None]] = {
    "parquet": write_parquet,
    "tfrecord": write_tfrecord,
    "mds": write_mds,
    "tar": write_tar,
}


def rows(count: int = 4, **fields: Any) -> list[Sample]:
    return [{"image": picture(row), "label": row % 2, **fields} for row in range(count)]


def refused(folder: Path, tmp_path: Path, **settings: Any) -> str:
    """The message of `inspect`, which has to be that of the index of a run."""
    uri = str(folder)
    with pytest.raises(SourceError) as first:
        raypipe.inspect(uri, config={"source": settings}, cpus=1, gpus=0)
    with pytest.raises(SourceError) as second:
        index(parse_config({"run": f"{tmp_path}/run", "source": {"uri": uri, **settings}}))
    assert str(first.value) == str(second.value)
    return str(first.value)


@pytest.mark.parametrize("format", WRITERS)
def test_labels_that_are_raw_bytes_are_no_class_names(tmp_path: Path, format: str) -> None:
    stored = [{**row, "label": f"{row['label']}\0\0\0"} for row in rows()]
    WRITERS[format](tmp_path / "a", stored)
    source = make(str(tmp_path))
    assert all("label is not a number or a name" in text for text in _problems(source))
    assert _problems(source) and not frozenset().union(*(scan.labels for scan in scans(source)))


def _problems(source: Any) -> list[str]:
    """Reject reasons, and errors of files."""
    errors = [part.error for scan in scans(source) for part in scan.fragments if part.error]
    return [*errors, *rejects(samples(source)).values()]


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("format", ["tfrecord", "tar"])
def test_a_misspelt_label_field_is_refused(tmp_path: Path, format: str) -> None:
    (tmp_path / "data").mkdir()
    WRITERS[format](tmp_path / "data" / "a", rows())
    message = refused(tmp_path / "data", tmp_path, label_column="lable")
    assert "no sample has a label: source.label_column is 'lable'" in message


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("format", WRITERS)
def test_splits_named_in_samples_are_not_mixed(tmp_path: Path, format: str) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    for name in ("train", "test"):
        # the names of the files do not show it
        WRITERS[format](tmp_path / "two" / {"train": "a", "test": "b"}[name], rows(split=name))
    assert "'split' names the split" in refused(tmp_path / "two", tmp_path)
    mixed = [*rows(split="train"), *rows(split="test")]
    WRITERS[format](tmp_path / "one" / "a", mixed)
    (scan,) = scans(make(f"{tmp_path}/one"))
    assert "'split' has several splits (test, train)" in scan.fragments[0].error
    # files that are named one by one are read as one source
    ending = {"parquet": "parquet", "tfrecord": "tfrecord", "mds": "mds", "tar": "tar"}[format]
    assert len(samples(make(f"{tmp_path}/two/{{a,b}}.{ending}"))) == 8


@pytest.mark.parametrize("format", ["tfrecord", "tar"])
def test_a_file_stored_plain_and_compressed_is_not_counted_twice(
    tmp_path: Path, format: str
) -> None:
    WRITERS[format](tmp_path / "a", rows())
    plain = tmp_path / f"a.{format}"
    (tmp_path / f"a.{format}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(SourceError, match=rf"a\.{format}\.gz and a\.{format} would be read as"):
        list(make(str(tmp_path)).files())
    assert len(samples(make(str(tmp_path), include=f"*.{format}"))) == 4


def test_an_mds_shard_that_the_index_lists_twice_is_read_once(tmp_path: Path) -> None:
    write_mds(tmp_path / "a", rows())
    (tmp_path / "index.json").write_bytes(mds_index(("a.mds", 4), ("a.mds", 4)))
    assert len(list(make(str(tmp_path)).files())) == 1
    (tmp_path / "index.json").write_bytes(mds_index())
    with pytest.raises(SourceError, match=r"index\.json lists no shard"):
        list(make(str(tmp_path)).files())


def test_an_mds_shard_with_fewer_samples_than_its_index_lists(tmp_path: Path) -> None:
    write_mds(tmp_path / "a", rows())
    (tmp_path / "index.json").write_bytes(mds_index(("a.mds", 6)))
    (scan,) = scans(make(str(tmp_path)))
    assert [part.samples for part in scan.fragments] == [4, 0]
    assert scan.fragments[1].error == (
        "from row 4 on: index.json lists 6 samples, but the shard has 4"
    )


def test_images_with_an_ending_of_two_parts(tmp_path: Path) -> None:
    members = {"0.input.png": IMAGE, "0.cls": b"1"}
    (tmp_path / "a.tar").write_bytes(tar(members))
    (reason,) = rejects(samples(make(str(tmp_path)))).values()
    assert reason == ("no image: only .input.png, .cls; set source.image_column to input.png")
    assert not rejects(samples(make(str(tmp_path), image_column="input.png")))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("name", WRITERS)
def test_a_copy_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[name](folder / "a", rows())
    (file,) = [file for file in folder.iterdir() if file.suffix != ".json"]
    copy = folder / f"a (1){file.suffix}"
    shutil.copy(file, copy)
    if name == "mds":  # its index names the shards
        WRITERS[name](folder / "a (1)", rows())
    assert f"a (1){file.suffix} and {file.name} would be read as" in refused(folder, tmp_path)
    if name != "mds":
        copy.write_bytes(copy.read_bytes() + b" ")  # not the same content
        assert len(list(make(str(folder)).files())) == 2


@pytest.mark.parametrize(
    ("path", "original"),
    [
        ("x/a.b (12).tar.gz", "x/a.b.tar.gz"),
        ("a - Copy.tar", "a.tar"),
        ("a - Copy (2).tar", "a.tar"),
        ("a copy 2.tar", "a.tar"),
        ("Copy of a.tar", "a.tar"),
        ("a (3rd copy).tar", "a.tar"),
        ("a-00001.tar", "a-00001.tar"),
        ("x copy/a.tar", "x copy/a.tar"),
        ("copy.tar", "copy.tar"),
    ],
)
def test_names_of_copies(path: str, original: str) -> None:
    assert copied_name(path) == original


def test_equal_images_with_another_label_are_counted(tmp_path: Path) -> None:
    for path, content in {"cat/0": 0, "cat/1": 0, "dog/0": 0, "dog/1": 1, "dog/2": 1}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / f"{path}.png").write_bytes(picture(content))
    lines = list(describe_survey(raypipe.inspect(str(tmp_path), cpus=1, gpus=0)))
    assert (
        "duplicates  3 of 5 drawn have the same bytes as another, and 1 of them another label"
        in lines
    )


@pytest.mark.parametrize("ending", ["~", ".bak", ".orig", ".part"])
def test_backups_of_images_are_left_out(tmp_path: Path, ending: str) -> None:
    for name in ("cat/0.png", f"cat/0.png{ending}", "dog/0", "dog/1.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(IMAGE)
    source = make(str(tmp_path))
    # images without an ending, or with an unusual one, stay images
    assert ids(samples(source)) == ["cat/0.png", "dog/0", "dog/1.tmp"]
    assert [left.example for left in source.left_out.values()] == [f"cat/0.png{ending}"]


def test_members_of_system_folders_are_no_samples(tmp_path: Path) -> None:
    members = {"0.png": IMAGE, "0.cls": b"1", "__MACOSX/0.png": b"x", ".cache/1.png": b"x"}
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert ids(samples(make(str(tmp_path)))) == ["a.tar#0"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            tar({"0.png": IMAGE, "0.jpg": IMAGE}),
            "several members can be the image: .png, .jpg; set source.image_column",
        ),
        (tar({"n01.tar": tar({"0.png": IMAGE})}), "a tar of tars, such as n01.tar; unpack it"),
        (gzip.compress(tar({"0.png": IMAGE})), "compressed with gzip; name it .tar.gz"),
        (bz2.compress(tar({"0.png": IMAGE})), "compressed with bzip2, which is not read"),
    ],
)
@pytest.mark.usefixtures("no_ray")
def test_tars_without_images_say_why(tmp_path: Path, content: bytes, words: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.tar").write_bytes(content)
    assert words in refused(folder, tmp_path)


def test_unreadable_files_that_stop_a_run_are_foreseen(tmp_path: Path) -> None:
    members = {f"{row}.png": picture(row) for row in range(50)}
    (tmp_path / "a.tar").write_bytes(tar(members))
    masks = {f"{row}.{kind}": picture(row) for row in range(50) for kind in ("png", "jpg")}
    (tmp_path / "b.tar").write_bytes(tar(masks))
    cost = raypipe.inspect(str(tmp_path), cpus=1, gpus=0).cost
    assert cost is not None
    (warning,) = [line for line in cost.warnings if "in the stage index" in line]
    assert "1 of 2 files cannot be read" in warning and "set source.image_column" in warning


@pytest.mark.usefixtures("no_ray")
def test_labels_of_a_number_are_spelt_alike(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    members = {f"{row}.png": picture(row) for row in range(4)}
    labels = {f"{row}.cls": label for row, label in enumerate((b"1", b"01", b"2", b"2"))}
    (tmp_path / "data" / "a.tar").write_bytes(tar(dict(sorted((members | labels).items()))))
    assert "label '1' is the same number as '01'" in refused(tmp_path / "data", tmp_path)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("format", WRITERS)
def test_names_in_one_file_and_numbers_in_another(tmp_path: Path, format: str) -> None:
    (tmp_path / "data").mkdir()
    WRITERS[format](tmp_path / "data" / "a", rows())
    WRITERS[format](tmp_path / "data" / "b", [{**row, "label": "cat"} for row in rows()])
    message = refused(tmp_path / "data", tmp_path)
    assert message.startswith(f"b.{format}: labels are partly names (such as 'cat'), but in a.")


def test_class_names_that_may_be_one() -> None:
    assert "'cat' and 'Cat '" in names_note(["cat", "dog", "Cat "])
    assert "'é' and 'e\u0301'" in names_note(["é", "e\u0301"])
    assert "a class is called 'nan'" in names_note(["cat", "nan"])
    assert not names_note(["cat", "cats", "10", "1"])
    for names in (["cat|dog", "dog|horse", "cat"], ["a, b", "b, c", "c, a"]):
        assert f"the class {min(set(names) - {'cat'})!r} seems to be several labels" in names_note(
            names
        )
    assert not names_note(["tench, Tinca tinca", "maillot", "maillot, tank suit", "crane, hoist"])


def test_numbers_that_may_be_ids() -> None:
    assert "only 3 of the classes 0 to 2,000" in sparse_classes_note({0, 1000, 2000}, 2001)
    assert not sparse_classes_note(set(range(1, 11)), 11)
    assert not sparse_classes_note({"a", "b"}, 40)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "path,label\n0.png,great white, shark\n",
            "line 2 has 3 cells, but the header has 2",
        ),
        ("a.csv", "path,label,label\n0.png,1,2\n", "2 columns are called 'label'"),
        ("a.jsonl", '{"path": "0.png"}\n', "JSON, which is not read as a list of images"),
        ("a.csv", "path,label\nhttps://a.org/0.png,1\n", "an address on the web, which is not"),
    ],
)
def test_lists_that_would_be_misread(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "0.png").write_bytes(IMAGE)
    with pytest.raises(SourceError) as error:
        list(make(f"{tmp_path}/{name}", format="filelist").files())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "label"),
    [("cat,0.png\n", "cat"), ("7,0.png,cat\n", "cat"), ("0.png,cat,7\n", "cat"), ("0.png\n", None)],
)
def test_the_path_of_a_list_without_a_header(tmp_path: Path, text: str, label: str | None) -> None:
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "0.png").write_bytes(IMAGE)
    (sample,) = samples(make(f"{tmp_path}/a.csv"))
    assert (sample.sample_id, sample.label) == ("0.png", label)


@pytest.mark.parametrize(
    ("log", "kind"),
    [("metadata/v1.metadata.json", "an Iceberg"), (".hoodie/hoodie.properties", "a Hudi")],
)
def test_tables_with_earlier_versions_are_refused(tmp_path: Path, log: str, kind: str) -> None:
    write_parquet(tmp_path / "a", rows())
    (tmp_path / log).parent.mkdir()
    (tmp_path / log).write_text("{}")
    with pytest.raises(SourceError, match=f"{kind} table .* pass ray.data.read_"):
        list(make(str(tmp_path), format="parquet").files())


def test_a_table_that_only_names_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a", [{"url": "https://a.org/0.png", "caption": "a cat"}])
    (scan,) = scans(make(str(tmp_path)))
    assert scan.fragments[0].error.startswith("no column holds images; 'url' names files or")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("images", "masks"), "images and masks are not classes; set source.uri to .*/images"),
        (("cat/train", "cat/test", "dog/train"), r"cat has folders of several splits.*'\*/t"),
        (
            ("fold_0/cat", "fold_0/dog", "fold_1/cat", "fold_1/dog"),
            r"fold_0, fold_1 are not classes: each has the folders cat, dog\. .*class_map to .*"
            r'\{"fold_0/cat": 0\}',
        ),
        (("2024-01/0", "2024-01/1", "2024-02/0", "2024-02/1"), "set source.uri to .*/2024-01; to"),
        (
            ("cat", "cat - Copy", "dog"),
            "'cat - Copy' would be a class, but seems to be a copy of 'ca",
        ),
        (("train/cat", "train/dog", "unlabeled"), "set source.uri to .*/train"),
        (("train_1/a", "train_1/b", "train_2/a", "train_2/b"), "train_1, train_2 are not classes"),
        (("fold1", "fold2"), "fold1, fold2 are not classes but parts for cross-validation"),
    ],
)
def test_folders_that_are_no_classes(
    tmp_path: Path, folders: tuple[str, ...], message: str
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.png").write_bytes(IMAGE)
    with pytest.raises(SourceError, match=message):
        list(make(str(tmp_path)).files())


@pytest.mark.parametrize(
    ("folders", "settings", "labels"),
    [
        # a number alone can be a class, and folders in a class need not be classes
        (("set_1", "set_2"), {}, {"set_1", "set_2"}),
        (("cat/left", "cat/right", "dog/left", "dog/right"), {}, {"cat", "dog"}),
        (("fold_0/cat", "fold_0/dog", "fold_1/cat", "fold_1/dog"), {"class_map": "map"}, {0, 1}),
        (("fold_0/cat", "fold_1/cat"), {"label_column": None}, {None}),
    ],
)
def test_folders_that_are_classes(
    tmp_path: Path, folders: tuple[str, ...], settings: dict[str, str], labels: set[object]
) -> None:
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "0.png").write_bytes(IMAGE)
    if "class_map" in settings:
        names = {folder: int(folder.endswith("dog")) for folder in folders}
        (tmp_path / "map.json").write_text(json.dumps(names))
        settings = {"class_map": f"{tmp_path}/map.json"}
    read = samples(make(f"{tmp_path}/data", **settings))
    assert {sample.label for sample in read} == labels and len(read) == len(folders)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.tar.bz2", "unpack the archives"),
        ("index.json", "set source.uri to the folder of the dataset"),
        ("a.jsonl", "write a list of images as CSV"),
        ("data/a.lance", "set source.format to lance"),
        ("a.arrow", "write the samples as Parquet"),
    ],
)
def test_files_of_no_format_come_with_a_remedy(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=remedy):
        make(str(tmp_path))
