"""Brace patterns and lists of shards: which names they stand for, and names without a file."""

from __future__ import annotations

import io
import os
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_helpers import ids, make, picture, samples, scans

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources import open_source
from raypipe.sources.location import MISSING, Location
from raypipe.sources.patterns import MAX_NAMES, expand, first_brace
from raypipe.tables.files import stored_files


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{1..3}b", ["a1b", "a2b", "a3b"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..011}", ["008", "009", "010", "011"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..9..4}", ["0", "4", "8"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{c..a}", ["c", "b", "a"]),
        ("{train,val}/{0..1}.tar", ["train/0.tar", "train/1.tar", "val/0.tar", "val/1.tar"]),
        ("{a,b{1,2}}", ["a", "b1", "b2"]),
        ("x{,y}", ["x", "xy"]),
        ("{x{1,2}}", ["{x1}", "{x2}"]),
        ("{1}", ["{1}"]),
        ("a{b", ["a{b"]),
        ("a}b{", ["a}b{"]),
        ("{a..10}", ["{a..10}"]),
        ("*.tar", ["*.tar"]),
    ],
)
def test_braces_are_those_of_a_shell(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names
    assert (first_brace(pattern) < 0) == (names == [pattern])


def test_a_pattern_for_too_many_names_is_refused_at_once() -> None:
    assert len(expand("{000000..001281}")) == 1282 and expand("{000000..001281}")[7] == "000007"
    for pattern in ("{0..999999999999}", "{0..9999}{0..9999}", "{1..9}" * 40):
        with pytest.raises(ValueError, match=f"more than {MAX_NAMES:,} names"):
            expand(pattern)


def tar(number: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in ((f"{number}.png", picture(number)), (f"{number}.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def table(number: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [picture(number)], "label": [number]}), buffer)
    return buffer.getvalue()


def fill(place: str, *names: str) -> str:
    for number, name in enumerate(names):
        storage.write_bytes(
            f"{place}/{name}", table(number) if name.endswith("parquet") else tar(number)
        )
    return place


def broken(source: Any) -> dict[str, str]:
    return {
        part.path: part.error for scan in scans(source) for part in scan.fragments if part.error
    }


def test_shards_by_a_brace_pattern(place: str) -> None:
    fill(place, "in/a-08.tar", "in/a-09.tar", "in/a-10.tar", "in/a-11.tar", "in/b-09.tar")
    source = make(f"{place}/in/a-{{09..11}}.tar")
    assert source.format == "webdataset"
    assert ids(samples(source)) == ["a-09.tar#1", "a-10.tar#2", "a-11.tar#3"] and not broken(source)
    assert ids(
        samples(make(f"{place}/{{in,out}}/{{b,a}}-{{09,10,12}}.tar", format="webdataset"))
    ) == [
        "in/a-09.tar#1",
        "in/a-10.tar#2",
        "in/b-09.tar#4",
    ]
    assert ids(samples(make(f"{place}/in/a-{{09..11}}.tar", include="*10*"))) == ["a-10.tar#2"]
    assert ids(samples(make(f"{place}/in/{{a,b}}-*9.tar"))) == ["a-09.tar#1", "b-09.tar#4"]
    assert ids(samples(make(f"{place}/i*/{{a,b}}-09.tar"))) == ["in/a-09.tar#1", "in/b-09.tar#4"]


def test_folders_by_a_brace_pattern(tmp_path: Any) -> None:
    for name in ("cat/1.png", "cat/deep/2.png", "dog/3.png", "eel/4.png"):
        storage.write_bytes(f"{tmp_path}/set/{name}", picture(1))
    found = samples(make(f"{tmp_path}/set/{{cat,dog,fox}}", format="imagefolder"))
    assert [(sample.sample_id, sample.label) for sample in found if not sample.reason] == [
        ("cat/1.png", "cat"),
        ("cat/deep/2.png", "cat"),
        ("dog/3.png", "dog"),
    ]
    assert [(sample.sample_id, sample.reason) for sample in found if sample.reason] == [
        ("fox", "no such file: deleted since it was listed, or its name is not UTF-8")
    ]
    fill(str(tmp_path), "train/x.parquet", "val/y.parquet", "test/z.parquet")
    storage.write_bytes(f"{tmp_path}/val/README.md", b"x")
    assert ids(samples(make(f"{tmp_path}/{{train,val}}/"))) == [
        "train/x.parquet#0",
        "val/y.parquet#0",
    ]


def test_shards_that_are_not_there_are_unreadable_files(place: str) -> None:
    fill(place, "in/a-1.tar", "in/a-3.tar")
    source = make(f"{place}/in/a-{{1..4}}.tar")
    assert ids(samples(source)) == ["a-1.tar#0", "a-3.tar#1"]
    assert broken(source) == dict.fromkeys(
        ("a-2.tar", "a-4.tar"), "no such file, although source.uri names it"
    )
    before = {file.path: file.stamp for file in source.files()}
    fill(place, "in/a-2.tar")  # it is read once it exists
    assert {
        file.path
        for file in make(f"{place}/in/a-{{1..4}}.tar").files()
        if before[file.path] != file.stamp
    } == {"a-2.tar"}
    for uri in (f"{place}/in/b-{{1..4}}.tar", f"{place}/none/b-{{1..4}}.tar"):
        with pytest.raises(
            SourceError, match=r"none of the 4 files it names exists, such as b-1.tar"
        ):
            make(uri)
    with pytest.raises(
        SourceError,
        match=r"x-\{0..99999999\}.tar: cannot be listed: the braces stand for more than 1,000,000",
    ):
        make(f"{place}/in/x-{{0..99999999}}.tar")


def test_many_shards_cost_one_listing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place, "in/a-00007.tar", "in/a-09999.tar", "in/other.tar")
    requests: list[str] = []
    retrying = storage.retrying
    for module in (storage, storage.files, storage.listings):
        monkeypatch.setattr(
            module, "retrying", lambda action, what: requests.append(what) or retrying(action, what)
        )
    found = list(make(f"{place}/in/a-{{00000..09999}}.tar", format="webdataset").files())
    assert len(found) == 10_000 and sum(file.stamp != MISSING for file in found) == 2
    assert 0 < len(requests) < 6


def test_a_list_of_shards(place: str, tmp_path: Any) -> None:
    fill(place, "in/a.tar", "in/deep/b.tar", "c.tar", "in/odd-{1,2}.tar", "in/part-0")
    fill(f"{tmp_path}/elsewhere", "d.tar", "e.tar")
    lines = [
        "# training shards", "deep/b.tar", "", "./a.tar ", "a.tar", "../c.tar",
        f"{tmp_path}/elsewhere/e.tar", "odd-{1,2}.tar",
        "part-0", f"{place}/in/none.tar",
    ]  # fmt: skip
    storage.write_bytes(f"{place}/in/shards.txt", "\r\n".join(lines).encode("utf-8-sig"))
    source = make(f"{place}/in/shards.txt", format="webdataset")
    inside = ["a.tar#0", "deep/b.tar#1", "odd-{1,2}.tar#3", "part-0#4"]
    assert sorted(ids(samples(source))) == sorted(
        [*inside, f"{place}/c.tar#2", f"{tmp_path}/elsewhere/e.tar#1"]
    )
    assert list(broken(source)) == ["none.tar"]
    assert ids(samples(make(f"{place}/in/shards.txt", format="webdataset", include="deep/*"))) == [
        "deep/b.tar#1"
    ]
    storage.write_bytes(f"{place}/in/SHARDS.TXT", b"none.tar\nnor this.tar\n")
    with pytest.raises(
        SourceError, match=r"SHARDS.TXT: none of the 2 files it names exists, such as none.tar"
    ):
        list(make(f"{place}/in/SHARDS.TXT", format="webdataset").files())
    for content, words in (
        (b"", "no files here"),
        (b"# only\n", "no files here"),
        (b"\xff\xfea", "text in UTF-8"),
    ):
        storage.write_bytes(f"{place}/in/other.txt", content)
        with pytest.raises(SourceError, match=words):
            list(make(f"{place}/in/other.txt", format="webdataset").files())


def test_a_list_of_parquet_files_tells_its_format(tmp_path: Any) -> None:
    fill(str(tmp_path), "x/1.parquet", "2.parquet")
    (tmp_path / "files.txt").write_text("x/1.parquet\n2.parquet\n")
    source = make(f"{tmp_path}/files.txt")
    assert source.format == "parquet" and ids(samples(source)) == ["2.parquet#0", "x/1.parquet#0"]


def test_names_that_have_braces_are_meant_as_they_are(tmp_path: Any) -> None:
    fill(
        str(tmp_path),
        "set{1,2}/a{1,2}.tar",
        "set{1,2}/b1.tar",
        "set{1,2}/b2.tar",
        "set1/c.tar",
        "set{3}/d1.tar",
    )
    for uri, expected in (
        (f"{tmp_path}/set{{1,2}}/a{{1,2}}.tar", ["a{1,2}.tar#0"]),
        (f"{tmp_path}/set{{1,2}}/b{{1,2}}.tar", ["b1.tar#1", "b2.tar#2"]),
        (f"{tmp_path}/set{{1,2}}/*1.tar", ["b1.tar#1"]),
        (f"{tmp_path}/set{{1,2}}", ["a{1,2}.tar#0", "b1.tar#1", "b2.tar#2"]),
        (f"{tmp_path}/set{{3}}/d{{1..1}}.tar", ["d1.tar#4"]),
        (f"{tmp_path}/set{{3}}/*.tar", ["d1.tar#4"]),
    ):
        assert ids(samples(make(uri))) == expected


def test_local_patterns_relative_and_through_links(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(str(tmp_path), "real/a-1.tar", "real/deep/b.tar")
    (tmp_path / "in").mkdir()
    os.symlink("../real/a-1.tar", tmp_path / "in" / "a-1.tar")
    os.symlink("../real/deep", tmp_path / "in" / "a-2.tar")
    os.symlink("../nowhere", tmp_path / "in" / "a-3.tar")
    monkeypatch.chdir(tmp_path)
    listed = Location(SourceSettings(uri="in/a-{1..3}.tar")).listing()
    assert [(file.path, file.stamp == MISSING) for file in listed] == [
        ("a-1.tar", False),
        ("a-2.tar/b.tar", False),
        ("a-3.tar", True),
    ]
    assert ids(samples(make("in/a-{1..2}.tar", format="webdataset"))) == [
        "a-1.tar#0",
        "a-2.tar/b.tar#1",
    ]
    (tmp_path / "l.txt").write_text("real/a-1.tar\n")
    assert ids(samples(make("l.txt", format="webdataset"))) == ["real/a-1.tar#0"]
    monkeypatch.chdir(tmp_path / "real")
    assert ids(samples(make("a-{1,1}.tar", format="webdataset"))) == ["a-1.tar#0"]


def test_braces_in_the_name_of_a_bucket(s3: str) -> None:
    fill(f"{s3}/buckets", "a.tar")
    bucket = s3.removeprefix("s3://")
    source = make(
        f"s3://{{no-such-bucket-,raypipe-}}{bucket.removeprefix('raypipe-')}/buckets/a.tar",
        format="webdataset",
    )
    assert ids(samples(source)) == [f"{s3}/buckets/a.tar#0"]
    assert len(broken(source)) == 1


@pytest.mark.parametrize(
    "uri", ["https://a.org", "http://a.org/data", "HTTPS://a.org/d.v1/", "http://a.org/{0..9}.tar"]
)
@pytest.mark.parametrize("format", ["auto", "webdataset", "imagefolder"])
def test_folders_on_the_web_are_refused_at_once(uri: str, format: str) -> None:
    with pytest.raises(SourceError, match="on the web, which cannot be listed; copy the files"):
        open_source(SourceSettings(uri=uri, format=format))
    with pytest.raises(SourceError, match="on the web"):
        stored_files(uri)
    assert open_source(SourceSettings(uri="http://a.org/x.tar", format="webdataset"))
