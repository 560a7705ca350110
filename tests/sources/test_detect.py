from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources import open_source
from raypipe.sources.detect import MAX_FILES, detect_format


def detected(uri: str, include: str = "*") -> str:
    return detect_format(SourceSettings(uri=uri, include=include))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.parquet", "README.md"], "parquet"),
        (["deep/A.PARQUET"], "parquet"),
        (["a.tar", "b.tar.gz", "index.json"], "webdataset"),
        (["c.tgz"], "webdataset"),
        (["a.tfrecord", "notes.txt"], "tfrecord"),
        (["cifar10-train.tfrecord-00000-of-00001", "features.json"], "tfrecord"),
        (["shard.00000.mds", "index.json"], "mds"),
        (["shard.00000.mds.zstd", "index.json"], "mds"),
        (["cat/1.JPG", "dog/2.webp", "labels.csv"], "imagefolder"),
        (["state.json", "dataset_info.json", "data-00000-of-00001.arrow"], "huggingface"),
        (["dataset_dict.json", "train/state.json"], "huggingface"),
    ],
)
def test_the_endings_tell_the_format(place: str, names: list[str], expected: str) -> None:
    for name in names:
        storage.write_bytes(f"{place}/set/{name}", b"x")
    assert detected(f"{place}/set") == expected
    if expected != "huggingface":  # that format is a folder
        assert detected(f"{place}/set/{names[0]}") == expected
        assert detected(f"{place}/*/{names[0]}") == expected
        assert detected(f"{place}/{{set,other}}/{names[0]}") == expected
    assert open_source(SourceSettings(uri=f"{place}/set")).format == expected


@pytest.mark.parametrize("name", ["list.csv", "LIST.TXT", "list.tsv"])
def test_a_list_is_told_by_its_own_name(place: str, name: str) -> None:
    storage.write_bytes(f"{place}/set/{name}", b"cat/1.png 0")
    storage.write_bytes(f"{place}/set/cat/1.png", b"x")
    assert detected(f"{place}/set/{name}") == "filelist"
    assert detected(f"{place}/set") == "imagefolder"
    with pytest.raises(SourceError, match="no such file or folder"):
        detected(f"{place}/set/none-{name}")


def test_a_list_of_shards_is_no_file_list(tmp_path: object) -> None:
    storage.write_bytes(f"{tmp_path}/shards.txt", b"# all of them\na-000.tar\na-001.tar\n")
    with pytest.raises(SourceError):  # the list is not read as a file of a format
        detected(f"{tmp_path}/shards.txt")


def test_a_listing_of_many_files_is_not_gone_through(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(uri: str) -> Iterator[storage.FileInfo]:
        for number in itertools.count():
            assert number <= MAX_FILES
            yield storage.FileInfo(f"{number}.png", 1, "1")

    monkeypatch.setattr(storage, "walk", endless)
    assert detected(str(tmp_path)) == "imagefolder"


def test_some_need_no_storage(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert detected("digits://") == "digits"
    assert detected("torchvision://CIFAR10") == "torchvision"
    assert detected("synthetic://?samples=5") == "synthetic"
    assert detected("huggingface://user/name") == "huggingface"
    assert detected("s3://bucket/set.lance/") == detected("lance:///data/set") == "lance"
    storage.write_bytes(
        f"{tmp_path}/synthetic/a.tar", b"x"
    )  # a folder called synthetic is a folder
    monkeypatch.chdir(str(tmp_path))
    assert detected("synthetic") == "webdataset"


def test_a_mixture_is_unclear_until_include_or_format_decides(tmp_path: object) -> None:
    for name in ("a.parquet", "b.parquet", "preview.png", "x.txt"):
        storage.write_bytes(f"{tmp_path}/{name}", b"x")
    with pytest.raises(
        SourceError,
        match=r"parquet and imagefolder among 4 files \(2 .parquet, 1 .*set source.format",
    ):
        detected(str(tmp_path))
    assert detected(str(tmp_path), "*.parquet") == "parquet"
    assert (
        open_source(SourceSettings(uri=str(tmp_path), format="imagefolder")).format == "imagefolder"
    )


def test_nothing_known_is_named(tmp_path: object) -> None:
    for name in ("a.csv", "b.csv", "c", "d.zip"):
        storage.write_bytes(f"{tmp_path}/{name}", b"x")
    with pytest.raises(
        SourceError,
        match=r"no Parquet, tar, TFRecord, MDS or image file among 4 files "
        r"\(2 .csv, 1 without an ending, 1 .zip\)",
    ):
        detected(str(tmp_path))
    with pytest.raises(SourceError, match="no such file or folder"):
        detected(f"{tmp_path}/none")


def test_one_file_of_another_name_is_read_when_the_format_is_given(tmp_path: object) -> None:
    storage.write_bytes(f"{tmp_path}/part-0", b"x")
    source = open_source(SourceSettings(uri=f"{tmp_path}/part-0", format="parquet"))
    assert [file.path for file in source.files()] == ["part-0"]


def test_sources_import_neither_torch_nor_ray() -> None:
    names = (
        "detect, digits, filelist, filesource, hub, huggingface, imagefolder, lance, location, mds, "
        "parquet, synthetic, table_source, tarfiles, tfrecord, torchvision_build, torchvision_request, "
        "torchvision_sets, webdataset"
    )
    program = (
        f"import sys; from raypipe.sources import {names}; "
        "print(sorted({'torch', 'ray', 'sklearn', 'datasets'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
        == "[]\n"
    )
