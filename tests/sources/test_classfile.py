from __future__ import annotations

import json
from typing import Any

import pytest
from source_helpers import ids, make, rejects, samples, scans
from test_imagefolder import fill

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.sources.classes import class_map
from raypipe.sources.classfile import read_class_file


def read(
    place: Any, content: str, name: str = "classes.txt"
) -> tuple[dict[str, int], tuple[str, ...]]:
    storage.write_bytes(f"{place}/{name}", content.encode())
    found = read_class_file(f"{place}/{name}")
    return found.index, found.names


@pytest.mark.parametrize(
    ("content", "index", "names"),
    [
        (
            "n01 tench, Tinca tinca\nn02 goldfish\n",
            {"n01": 0, "n02": 1},
            ("tench, Tinca tinca", "goldfish"),
        ),
        (
            "/a/airfield 0\n/a/apartment_building/outdoor 1",
            {"a/airfield": 0, "a/apartment_building/outdoor": 1},
            None,
        ),
        ("dog 1\ncat 0\n", {"dog": 1, "cat": 0}, ("cat", "dog")),
        ("big dog, 1\nold cat, 0\n", {"big dog": 1, "old cat": 0}, ("old cat", "big dog")),
        ("big dog\tWau wau\ncat\tMiau", {"big dog": 0, "cat": 1}, ("Wau wau", "Miau")),
        ("dog\n\ncat", {"dog": 0, "cat": 1}, ("dog", "cat")),
        (
            "n1 crane\nn2 crane\nn3 owl 2",
            {"n1": 0, "n2": 1, "n3": 2},
            ("crane (n1)", "crane (n2)", "owl 2"),
        ),
        ('{"dog": 1, "cat/": 0, "wolf": 1}', {"dog": 1, "cat": 0, "wolf": 1}, ("cat", "dog")),
        ('{"n1": "tench", "n2": "crane"}', {"n1": 0, "n2": 1}, ("tench", "crane")),
        ('{"a": 0, "b": 2}', {"a": 0, "b": 2}, ("a", "1", "b")),
    ],
)
def test_class_maps(
    tmp_path: Any, content: str, index: dict[str, int], names: tuple[str, ...] | None
) -> None:
    assert read(tmp_path, content) == (index, names or tuple(index))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "names no class"),
        ("{", "is not valid JSON"),
        ('{"a": [1]}', "should be {folder: name or number"),
        ('{"a": true}', "should be {folder: name or number"),
        ('{"a": 1, "b": "x"}', r"gives numbers \(such as of 'a'\) and names"),
        ('{"a": -1}', "gives 'a' the number -1"),
        ('{"a": 1000000000}', "gives 'a' the number 1000000000"),
        ("a 1\na 2", "names 'a' twice"),
    ],
)
def test_a_map_that_cannot_be_used_is_named(tmp_path: Any, content: str, words: str) -> None:
    with pytest.raises(SourceError, match=rf"classes\.txt: the class map {words}"):
        read(tmp_path, content)
    with pytest.raises(SourceError, match=r"no such file; set source.class_map"):
        read_class_file(f"{tmp_path}/none.json")


def test_folders_get_their_classes_from_the_map(place: str) -> None:
    fill(
        f"{place}/set",
        [
            "n01/1.png",
            "n02/images/2.png",
            "n02/images/n01/3.png",
            "other/4.png",
            "n01_5.png",
            "6.png",
        ],
    )
    storage.write_bytes(f"{place}/map.txt", b"n02 goldfish\nn01 tench, Tinca tinca\nn03 nobody\n")
    source = make(f"{place}/set", class_map=f"{place}/map.txt")
    found = samples(source)
    # the longest folder in the map wins: n01 within n02/images is not in it
    assert {sample.sample_id: sample.label for sample in found if not sample.reason} == {
        "n01/1.png": 1,
        "n01_5.png": 1,
        "n02/images/2.png": 0,
        "n02/images/n01/3.png": 0,
    }
    assert rejects(found) == {
        "6.png": "the class map names no folder of it: 6.png",
        "other/4.png": "the class map names no folder of it: other",
    }
    scan = scans(source)[0]
    classes = class_map(scan.class_names, scan.labels, None)
    assert classes.names == ("goldfish", "tench, Tinca tinca", "nobody")
    assert classes.index(1) == (1, "")


def test_a_worker_needs_no_class_map_and_another_map_makes_other_fragments(tmp_path: Any) -> None:
    fill(f"{tmp_path}/set", ["a/1.png", "b/2.png"])
    (tmp_path / "map.json").write_text(json.dumps({"a": 1, "b": 0}))
    source = make(f"{tmp_path}/set", class_map=f"{tmp_path}/map.json")
    fragments = [part for scan in scans(source) for part in scan.fragments]
    (tmp_path / "map.json").write_text(json.dumps({"a": 1, "b": 0, "c": 2}))
    others = [
        part
        for scan in scans(make(f"{tmp_path}/set", class_map=f"{tmp_path}/map.json"))
        for part in scan.fragments
    ]
    assert not {part.fragment_id for part in fragments} & {part.fragment_id for part in others}
    (tmp_path / "map.json").unlink()
    worker = make(f"{tmp_path}/set", class_map=f"{tmp_path}/map.json", format="imagefolder")
    assert [sample.label for part in fragments for sample in worker.read(part)] == [1, 0]


def test_classes_of_several_levels(tmp_path: Any) -> None:
    fill(f"{tmp_path}/set", ["a/airfield/1.png", "a/apartment/outdoor/2.png"])
    (tmp_path / "map.txt").write_text("/a/airfield 0\n/a/apartment/outdoor 1\n")
    found = samples(make(f"{tmp_path}/set", class_map=f"{tmp_path}/map.txt"))
    assert [sample.label for sample in found] == [0, 1] and ids(found)[
        1
    ] == "a/apartment/outdoor/2.png"


def test_a_map_of_other_folders_is_an_error(tmp_path: Any) -> None:
    fill(f"{tmp_path}/set", ["a/1.png", "b/2.png"])
    (tmp_path / "map.txt").write_text("n01 tench\n")
    with pytest.raises(
        SourceError,
        match=r"no folder \(such as 'b'\) is in the class map .*map.txt, "
        "which names folders such as 'n01'",
    ):
        list(make(f"{tmp_path}/set", class_map=f"{tmp_path}/map.txt").files())


@pytest.mark.parametrize("names", [["train", "val"], ["Train", "validation", "test"], ["valid"]])
def test_splits_are_no_classes(place: str, names: list[str]) -> None:
    fill(f"{place}/set", [f"{name}/cat/1.png" for name in names])
    with pytest.raises(
        SourceError,
        match=rf"set: .* are not classes; set source.uri to {place}/set/{sorted(names)[0]}",
    ):
        list(make(f"{place}/set").files())
    assert [sample.label for sample in samples(make(f"{place}/set/{names[0]}"))] == ["cat"]
    fill(f"{place}/set", ["cat/1.png"])
    if len(names) > 1:  # no folder next to two splits makes these classes
        with pytest.raises(SourceError, match="are not classes"):
            list(make(f"{place}/set").files())
    else:
        assert len(samples(make(f"{place}/set"))) == len(names) + 1


def test_more_classes_than_names_have_numbers_and_fewer_are_refused() -> None:
    assert class_map(("a", "b"), frozenset(), 4).names == ("a", "b", "2", "3")
    assert class_map(None, frozenset({"cat", "dog"}), 3).names == ("cat", "dog", "2")
    assert class_map(("a", "b"), frozenset(), 2).names == ("a", "b")
    with pytest.raises(
        SourceError, match=r"source.num_classes is 1, but the source names 2 classes, such as 'dog'"
    ):
        class_map(None, frozenset({"cat", "dog"}), 1)
