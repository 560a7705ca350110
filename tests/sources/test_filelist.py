from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from source_helpers import ids, make, picture, rejects, samples, scans
from test_imagefolder import fill

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources import filelist, open_source
from raypipe.sources.classes import class_map
from raypipe.sources.filelist import _HashSet


def write(place: str, name: str, text: str) -> str:
    storage.write_bytes(f"{place}/{name}", text.encode())
    return f"{place}/{name}"


def test_paths_and_labels_in_the_order_of_the_list(place: str) -> None:
    fill(place, ["b/1.png", "a 1/ü.png", "c.png"])
    source = make(
        write(place, "train.csv", "path,label\nb/1.png,2\n/a 1/ü.png,7.0\n./c.png,\nb/none.png,0\n")
    )
    assert source.format == "filelist"
    found = samples(source, lambda sample_id: "1" in sample_id)
    assert ids(found) == ["b/1.png", "a 1/ü.png"] and [sample.label for sample in found] == [2, 7]
    found = samples(source)
    assert ids(found) == ["b/1.png", "a 1/ü.png", "c.png", "b/none.png"]
    assert [sample.image for sample in found] == [picture(0), picture(1), picture(2), None]
    assert found[2].label is None and found[3].reason == f"no such file below {place}"
    assert scans(source)[0].labels == {0, 2, 7}


def test_local_and_s3_give_the_same(tmp_path: Any, s3: str) -> None:
    paths = [f"class {number % 3}/{number:03d} ü.png" for number in range(50)]
    text = "".join(f"{path} {number % 3}\n" for number, path in enumerate(paths))
    found = [
        samples(make(write(fill(place, paths), "list.txt", text), fragment_samples=20))
        for place in (str(tmp_path), f"{s3}/listed")
    ]
    assert len(found[0]) == 50 and not rejects(found[0]) and found[0] == found[1]


def test_a_folder_stands_for_the_one_list_in_it(place: str) -> None:
    fill(f"{place}/set", ["a.png"])
    write(f"{place}/set", "some.txt", "a.png 3\n")
    assert samples(make(f"{place}/set", format="filelist"))[0].label == 3
    write(f"{place}/set", "other.tsv", "a.png\t4\n")
    with pytest.raises(
        SourceError,
        match=r"several lists: other.tsv, some.txt; set source.uri to the file list itself",
    ):
        list(make(f"{place}/set", format="filelist").files())
    with pytest.raises(SourceError, match=r"no .csv or .tsv or .txt file here"):
        list(make(f"{place}/none", format="filelist").files())
    with pytest.raises(SourceError, match=r"none.csv: no such file; check source.uri"):
        list(make(f"{place}/none.csv", format="filelist").files())


def test_the_root_may_be_elsewhere(place: str, s3: str) -> None:
    fill(f"{s3}/elsewhere", ["x/1.png"])
    found = samples(make(write(place, "list.txt", "x/1.png 1\n"), root=f"{s3}/elsewhere"))
    assert [(sample.sample_id, sample.label, sample.image) for sample in found] == [
        ("x/1.png", 1, picture(0))
    ]


def test_nothing_outside_the_root_is_read(tmp_path: Any) -> None:
    fill(f"{tmp_path}/root", ["a.png", "etc/passwd"])
    fill(f"{tmp_path}", ["secret.png"])
    root = f"{tmp_path}/root"
    listed = [
        "../secret.png",
        "a/../../secret.png",
        f"{root}/../secret.png",
        f"file://{root}/../secret.png",
        f"file://{tmp_path}/secret.png",
        "s3://bucket/secret.png",
        f"{tmp_path}/secret.png",
        "/etc/passwd",
        f"{root}/a.png",
    ]
    found = samples(make(write(root, "list.csv", "path\n" + "\n".join(listed))))
    assert [sample.image is not None for sample in found] == [False] * 7 + [True, True]
    assert found[7].image == picture(1)  # the file below the root
    assert all(
        sample.reason.startswith("a path with '..', which is not followed") for sample in found[:4]
    )
    assert found[4].reason.startswith(f"outside {root}") and found[5].reason.startswith("outside ")
    assert found[6].reason == f"no such file below {root}"  # a leading slash means the root
    assert ids(found)[7:] == ["etc/passwd", "a.png"]


def test_absolute_paths_are_read_below_a_root_that_holds_them(tmp_path: Any, s3: str) -> None:
    fill(f"{tmp_path}/data", ["a.png", "b.png"])
    uri = write(
        f"{tmp_path}/lists",
        "list.txt",
        f"{tmp_path}/data/a.png 1\nfile://{tmp_path}/data/b.png 2\n",
    )
    with pytest.raises(
        SourceError, match=r"the listed file is not below|none of 1 lines|set source.root"
    ):
        list(make(uri).files())
    for root in ("/", str(tmp_path), f"file://{tmp_path}/data/"):
        found = samples(make(uri, root=root))
        assert [sample.label for sample in found] == [1, 2] and not rejects(found)
    fill(f"{s3}/uris", ["a.png"])
    uri = write(str(tmp_path), "uris.txt", f"{s3}/uris/a.png 1\n{s3}-other/a.png 2\n")
    found = samples(make(uri, root=s3))
    assert ids(found)[0] == "uris/a.png" and not found[0].reason and "outside " in found[1].reason


def test_a_path_that_comes_again_is_a_reject_wherever_it_is(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelist, "BLOCK_LINES", 7)
    root = fill(str(tmp_path), [f"d/{number}.png" for number in range(30)])
    listed = [f"d/{number}.png" for number in range(30)]
    again = ["d/3.png", "/d/3.png", "d//29.png", "d/./28.png", "d/3.png"]
    source = make(
        write(root, "list.txt", "\n".join(f"{path} 1" for path in [*listed, *again])),
        fragment_samples=4,
    )
    found = samples(source)
    assert ids(found) == [*listed, "d/3.png", "d/3.png", "d//29.png", "d/./28.png", "d/3.png"]
    assert [bool(sample.reason) for sample in found] == [False] * 30 + [True] * 5
    assert (
        found[30].reason
        == "duplicate: an earlier line names it, and its label counts (occurrence 2)"
        and found[-1].reason.endswith("(occurrence 4)")
    )
    # units of equal lines have different ids
    for lines in (["../x.png"] * 3, ["d/3.png"] * 3):
        uri = write(root, "same.csv", "path\nd/1.png\n" + "\n".join(lines))
        assert len(samples(make(uri, fragment_samples=1))) == 4


def test_lines_without_a_path_are_rejects(tmp_path: Any) -> None:
    fill(str(tmp_path), ["a.png"])
    found = samples(
        make(write(str(tmp_path), "x.csv", "label,path\n1,a.png\n2,\n3,/\n4\n5,a\0.png\n"))
    )
    assert rejects(found) == {
        "x.csv#line-3": "the line has no path",
        "x.csv#line-4": "the line has no path",
        "x.csv#line-5": "the line has no path",
        "x.csv#line-6": "the line holds a zero byte",
    }


def test_what_is_listed_and_no_image_file_is_a_reject(tmp_path: Any) -> None:
    fill(str(tmp_path), ["a.png", "d/b.png"])
    os.mkfifo(f"{tmp_path}/pipe.png")
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    listed = ["a.png", "d", "pipe.png", "nowhere.png", "a.png/b.png", "n" * 300 + ".png"]
    found = samples(make(write(str(tmp_path), "list.csv", "path\n" + "\n".join(listed))))
    assert list(rejects(found)) == listed[1:] and all(sample.reason for sample in found[1:])


def test_labels_of_all_kinds_go_to_the_class_map(tmp_path: Any) -> None:
    root = fill(str(tmp_path), [f"{number}.png" for number in range(6)])
    uri = write(
        root, "x.csv", "path,label\n0.png,0\n1.png,-2\n2.png,1\n3.png,99\n4.png,\n5.png,cat\n"
    )
    storage.write_bytes(f"{root}/classes.json", b'{"dog": 0, "cat": 1}')
    source = make(uri, class_map=f"{root}/classes.json")
    (scan,) = scans(source)
    classes = class_map(scan.class_names, scan.labels, None)
    found = [classes.index(sample.label) for sample in samples(source)]
    assert [index for index, _ in found] == [0, -1, 1, -1, -1, 1]
    assert [bool(reason) for _, reason in found] == [False, True, False, True, False, False]
    # labels in text are sorted if there is no class map
    write(root, "x.csv", "path,label\n0.png,dog\n1.png,cat\n")
    assert class_map(None, scans(make(uri))[0].labels, None).names == ("cat", "dog")


def test_include_picks_lines(tmp_path: Any) -> None:
    root = fill(str(tmp_path), ["train/1.png", "val/2.png"])
    uri = write(root, "all.txt", "train/1.png 0\nval/2.png 1\n")
    assert ids(samples(make(uri, include="val/*"))) == ["val/2.png"]
    with pytest.raises(SourceError, match=r"no path that matches source.include = 'test/\*'"):
        list(make(uri, include="test/*").files())
    with pytest.raises(SourceError, match="no line"):
        list(make(write(root, "empty.csv", "path,label\n")).files())


def test_a_new_line_changes_few_units(tmp_path: Any) -> None:
    root = str(tmp_path)
    text = [f"{number:04d}.png {number % 5}" for number in range(600)]
    for line in text:
        (tmp_path / line.split()[0]).touch()
    source = make(write(root, "list.txt", "\n".join(text)), fragment_samples=16)
    before = {scan.fragments[0].fragment_id for scan in scans(source)}
    units = list(source.files())
    assert (
        max(len(unit.members) for unit in units) == 16
        and sum(len(unit.members) for unit in units) == 600
    )
    write(root, "list.txt", "\n".join([*text[:100], "0100a.png 1", *text[100:]]))
    assert len({scan.fragments[0].fragment_id for scan in scans(source)} - before) <= 4
    write(root, "list.txt", "\n".join([*text[:300], "0300.png 3", *text[301:]]))  # another label
    assert len({scan.fragments[0].fragment_id for scan in scans(source)} - before) == 1


def test_a_root_with_none_of_the_files_is_an_error_and_with_one_is_not(tmp_path: Any) -> None:
    text = "\n".join(f"{number}.png 1" for number in range(20))
    uri = write(str(tmp_path), "list.txt", text)
    with pytest.raises(
        SourceError,
        match=rf"none of 20 listed files is below {tmp_path} .*set source.root",
    ):
        list(make(uri).files())
    many = write(str(tmp_path), "many.txt", "\n".join(f"{row}.png 1" for row in range(100)))
    with pytest.raises(SourceError, match="none of 32 listed files drawn at random is below"):
        list(make(many).files())
    fill(str(tmp_path), ["17.png"])
    assert len(rejects(samples(make(uri)))) == 19


PLACES = {
    "places365_train_standard.txt": "/a/airfield/1.jpg 0\n/b/bar/2.jpg 1\n",
    "categories_places365.txt": "/a/airfield 0\n/b/bar 1\n/c/cabin 2\n",
    "places365_val.txt": "Places365_val_1.jpg 1\n",
}


@pytest.mark.parametrize(
    ("folders", "image_size", "expected"),
    [
        (["data_256"], 64, "data_256"),
        (["data_large"], 64, "data_large"),
        (["data_large", "data_256"], 64, "data_256"),
        (["data_large", "data_256"], 256, "data_256"),
        (["data_large", "data_256"], 257, "data_large"),
        (["data_256_standard", "data_large_standard"], 64, "data_256_standard"),
        (["data_large_standard", "data_256_challenge"], 64, "data_large_standard"),
        (["data_256"], 512, "data_256"),
    ],
)
def test_places365_is_found_by_its_names(
    tmp_path: Any, folders: list[str], image_size: int, expected: str
) -> None:
    for name, text in PLACES.items():
        write(str(tmp_path), name, text)
    for folder in folders:
        fill(f"{tmp_path}/{folder}", ["a/airfield/1.jpg", "b/bar/2.jpg"])
    found = open_source(SourceSettings(uri=str(tmp_path))).resolved_settings(image_size)
    assert (found.format, found.uri, found.root, found.class_map) == (
        "filelist",
        f"{tmp_path}/places365_train_standard.txt",
        f"{tmp_path}/{expected}",
        f"{tmp_path}/categories_places365.txt",
    )
    assert (
        open_source(SourceSettings(uri=str(tmp_path), root="/elsewhere"))
        .resolved_settings(image_size)
        .root
        == "/elsewhere"
    )


def test_a_list_may_be_named_by_a_relative_path(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in PLACES.items():
        write(str(tmp_path), name, text)
    fill(f"{tmp_path}/data_256", ["a/airfield/1.jpg", "b/bar/2.jpg"])
    fill(str(tmp_path), ["x.png"])
    write(str(tmp_path), "x.txt", f"x.png 1\n{tmp_path}/x.png 1")
    monkeypatch.chdir(tmp_path)
    for uri in (".", "places365_train_standard.txt"):
        assert [bool(sample.reason) for sample in samples(make(uri))] == [False, False]
        assert scans(make(uri))[0].class_names == ("a/airfield", "b/bar", "c/cabin")
    assert [sample.reason for sample in samples(make("x.txt"))] == [
        "",
        "duplicate: an earlier line names it, and its label counts (occurrence 2)",
    ]


def test_places365_is_read(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in PLACES.items():
        write(f"{place}/set", name, text)
    fill(f"{place}/set/data_256", ["a/airfield/1.jpg", "b/bar/2.jpg"])
    fill(f"{place}/set/val_256", ["Places365_val_1.jpg"])
    monkeypatch.setattr(storage, "walk", lambda uri: pytest.fail(f"{uri} was listed"))
    for source in (make(f"{place}/set"), make(f"{place}/set/places365_train_standard.txt")):
        found = samples(source)
        assert ids(found) == ["a/airfield/1.jpg", "b/bar/2.jpg"] and [
            sample.label for sample in found
        ] == [0, 1]
        assert scans(source)[0].class_names == ("a/airfield", "b/bar", "c/cabin")
    assert [
        (sample.sample_id, sample.label)
        for sample in samples(make(f"{place}/set/places365_val.txt"))
    ] == [("Places365_val_1.jpg", 1)]


def test_of_two_lists_of_places365_the_one_with_images(tmp_path: Any) -> None:
    write(str(tmp_path), "places365_train_challenge.txt", "/a/airfield/9.jpg 0\n")
    fill(f"{tmp_path}/data_large_challenge", ["a/airfield/9.jpg"])
    assert ids(samples(make(str(tmp_path)))) == ["a/airfield/9.jpg"]
    write(str(tmp_path), "places365_train_standard.txt", PLACES["places365_train_standard.txt"])
    assert ids(samples(make(str(tmp_path)))) == ["a/airfield/9.jpg"]
    fill(f"{tmp_path}/data_256_standard", ["a/airfield/1.jpg", "b/bar/2.jpg"])
    assert ids(samples(make(str(tmp_path)))) == ["a/airfield/1.jpg", "b/bar/2.jpg"]


def test_workers_look_for_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in PLACES.items():
        write(str(tmp_path), name, text)
    fill(f"{tmp_path}/data_256", ["a/airfield/1.jpg", "b/bar/2.jpg"])
    settings = open_source(SourceSettings(uri=str(tmp_path))).resolved_settings(64)
    fragments = [
        part for scan in scans(filelist.FileListSource(settings)) for part in scan.fragments
    ]
    for name in ("exists", "is_file", "names"):
        monkeypatch.setattr(storage, name, lambda uri: pytest.fail(f"{uri} was asked for"))
    worker = filelist.FileListSource(settings)
    assert [sample.label for part in fragments for sample in worker.read(part)] == [0, 1]


def test_repeated_hashes_are_found_in_bounded_memory() -> None:
    random = np.random.default_rng(0)
    seen, before = _HashSet(), set[int]()
    for _ in range(60):
        block = random.integers(0, 4000, 50).tolist()
        expected = []
        for value in block:
            expected.append(value in before)
            before.add(value)
        assert seen.add(block).tolist() == expected
    assert len(seen._runs) < 12 and sum(map(len, seen._runs)) == len(before)
    assert seen.add([]).tolist() == []


@pytest.mark.parametrize("labels", [("1", "01"), ("01", "1"), ("2", "1", "001")])
def test_two_spellings_of_a_number_are_not_one_class(
    tmp_path: Any, labels: tuple[str, ...]
) -> None:
    fill(str(tmp_path), [f"{number}.png" for number in range(4)])
    lines = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    uri = write(str(tmp_path), "list.csv", "\n".join(["path,label", *lines]))
    words = f"line {len(labels) + 1}: label '{labels[-1]}' is the same number as '{labels[-2]}'"
    with pytest.raises(SourceError, match=words):
        list(make(uri).files())
    same = "path,label\n0.png,01\n1.png,1.0\n2.png,01.0\n".replace(",1.0", ",02.0")
    found = samples(make(write(str(tmp_path), "same.csv", same)))
    assert [sample.label for sample in found] == [1, 2, 1]


def test_names_in_another_unicode_form_are_explained(tmp_path: Any) -> None:
    fill(str(tmp_path), ["e\u0301.png"])
    if not (tmp_path / "e\u0301.png").exists() or (tmp_path / "\xe9.png").exists():
        pytest.skip("this file system changes names")
    uri = write(str(tmp_path), "list.csv", "path,label\n\xe9.png,a\n")
    with pytest.raises(SourceError, match="they exist with accents in the Unicode form NFD"):
        list(make(uri).files())
