from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from source_helpers import ids, make, picture, rejects, samples, scans

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.sources import smallfiles
from raypipe.sources.classes import class_map
from raypipe.vision.decode import decode_batch


def fill(place: str, paths: list[str]) -> str:
    for number, path in enumerate(paths):
        storage.write_bytes(f"{place}/{path}", picture(number))
    return place


def test_the_first_level_is_the_class(place: str) -> None:
    fill(
        f"{place}/set",
        [
            "dog/1.png",
            "cat/deep/er/2.JPG",
            "cat/1.jpeg",
            "dog/3.TIFF",
            ".git/x.png",
            "dog/.y.png",
        ],
    )
    storage.write_bytes(f"{place}/set/cat/note.txt", b"about cats")
    source = make(f"{place}/set")
    found = samples(source, lambda sample_id: True)
    assert ids(found) == ["cat/1.jpeg", "cat/deep/er/2.JPG", "dog/1.png", "dog/3.TIFF"]
    assert [sample.label for sample in found] == ["cat", "cat", "dog", "dog"]
    assert [sample.image for sample in found] == [picture(2), picture(1), picture(0), picture(3)]
    labels = frozenset().union(*(scan.labels for scan in scans(source)))
    assert class_map(None, labels, None).names == ("cat", "dog")


def test_folders_of_systems_are_no_classes(place: str) -> None:
    names = ["@eaDir", "__MACOSX", "_temporary", "#recycle", ".ipynb_checkpoints"]
    fill(f"{place}/set", ["cat/1.png", *(f"{name}/cat/1.png" for name in names)])
    fill(f"{place}/set", [f"cat/{name}/1.png" for name in names])
    assert ids(samples(make(f"{place}/set"))) == ["cat/1.png"]


def test_keys_that_look_like_other_places_stay_in_the_bucket(s3: str, tmp_path: Any) -> None:
    """A key can have empty names, or look like a path of this machine or a URL."""
    outside = tmp_path / "secret.png"
    outside.write_bytes(picture(9))
    bucket, keys = f"{s3}/odd", [f"/{outside}", "/cat/1.png", "http://host/1.png", "cat/2.png"]
    filesystem, root = storage.filesystem(bucket)
    for number, key in enumerate(keys):
        filesystem.pipe_file(f"{root}/{key}", picture(number))
    found = {sample.sample_id: sample for sample in samples(make(bucket))}
    assert {key: sample.image for key, sample in found.items()} == {
        key: picture(number) for number, key in enumerate(keys)
    }
    assert found["/cat/1.png"].label == "cat" == found["cat/2.png"].label


def test_a_flat_folder_has_no_labels(place: str) -> None:
    fill(f"{place}/flat", ["b.png", "a.png"])
    found = samples(make(f"{place}/flat"))
    assert ids(found) == ["a.png", "b.png"] and [sample.label for sample in found] == [None, None]
    assert all(scan.labels == frozenset() for scan in scans(make(f"{place}/flat")))


def test_local_and_s3_give_the_same(tmp_path: Any, s3: str) -> None:
    paths = [f"class {number % 3}/{number:03d} ü.png" for number in range(50)]
    local = samples(make(fill(str(tmp_path), paths), fragment_samples=20))
    assert len(local) == 50 and not rejects(local)
    assert local == samples(make(fill(f"{s3}/folder", paths), fragment_samples=20))


def test_one_file_a_glob_and_include(place: str) -> None:
    fill(f"{place}/set", ["cat/1.png", "cat/2.png", "dog/1.png"])
    assert ids(samples(make(f"{place}/set/cat/1.png"))) == ["1.png"]
    assert ids(samples(make(f"{place}/set/*/1.png"))) == ["cat/1.png", "dog/1.png"]
    assert ids(samples(make(f"{place}/set", include="cat/*"))) == ["cat/1.png", "cat/2.png"]
    assert ids(samples(make(f"{place}/*/cat/1.png"))) == ["set/cat/1.png"]


def test_wanted_files_only_are_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(fill(str(tmp_path), [f"{number}.png" for number in range(40)]))
    read: list[str] = []
    read_bytes = storage.read_bytes
    monkeypatch.setattr(
        storage,
        "read_bytes",
        lambda uri, start: read.append(storage.name(uri)) or read_bytes(uri, start),
    )
    found = [
        sample
        for scan in scans(source)
        for part in scan.fragments
        for sample in source.read(part, lambda sample_id: sample_id in {"3.png", "17.png"})
    ]
    assert sorted(read) == sorted(ids(found)) == ["17.png", "3.png"]


def test_units_are_bounded_and_a_new_file_changes_few_of_them(tmp_path: Any) -> None:
    for number in range(600):
        (tmp_path / f"{number:04d}.png").write_bytes(b"x")
    source = make(str(tmp_path), fragment_samples=16)
    before = {scan.fragments[0].fragment_id for scan in scans(source)}
    units = list(source.files())
    assert [path for unit in units for path in unit.members] == [
        f"{number:04d}.png" for number in range(600)
    ]
    assert max(len(unit.members) for unit in units) == 16 and len(units) < 120
    assert all(unit.path == unit.members[0] and unit.size == len(unit.members) for unit in units)
    (tmp_path / "0100a.png").write_bytes(b"x")
    assert len({scan.fragments[0].fragment_id for scan in scans(source)} - before) <= 4
    os.utime(tmp_path / "0300.png", (1, 1))
    assert len({scan.fragments[0].fragment_id for scan in scans(source)} - before) <= 5


def test_reading_is_ahead_ordered_and_bounded(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(fill(str(tmp_path), [f"{number:03d}.png" for number in range(100)]))
    lock, busy, most, done = threading.Lock(), 0, 0, 0

    def slow(uri: str, start: int | None = None) -> bytes:
        nonlocal busy, most, done
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.002 if uri.endswith("0.png") else 0.001)
        with lock:
            busy -= 1
            done += 1
        return storage.name(uri).encode()

    monkeypatch.setattr(storage, "read_bytes", slow)
    found = []
    for unit in source.files():
        for part in source.scan(unit).fragments:
            done = 0
            for position, sample in enumerate(source.read(part)):
                assert sample.image == sample.sample_id.encode()
                assert done <= position + smallfiles.LOOK_AHEAD
                found.append(sample.sample_id)
    assert found == [f"{number:03d}.png" for number in range(100)]
    assert 1 < most <= smallfiles.READERS


def test_what_cannot_be_read_is_a_reject(place: str) -> None:
    fill(place, ["a.png", "b.png", "c.png"])
    storage.write_bytes(f"{place}/b.png", b"")
    source = make(place)
    fragments = [part for scan in scans(source) for part in scan.fragments]
    storage.delete(f"{place}/c.png")
    found = [sample for part in fragments for sample in source.read(part)]
    assert ids(found) == ["a.png", "b.png", "c.png"]
    assert found[1].image == b"" and "no such file" in found[2].reason
    assert [bool(reason) for reason in decode_batch(found, 8, 100)[1]] == [False, True, True]


def test_denied_files_are_rejects_on_disk_and_faults_on_s3(
    tmp_path: Any, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(uri: str, start: int | None = None) -> bytes:
        raise PermissionError(13, "Permission denied")

    sources = [make(fill(str(tmp_path), ["a.png"])), make(fill(f"{s3}/denied", ["a.png"]))]
    parts = [scans(source)[0].fragments[0] for source in sources]
    monkeypatch.setattr(storage, "read_bytes", denied)
    assert next(sources[0].read(parts[0])).reason == "cannot be read: Permission denied"
    with pytest.raises(PermissionError):
        next(sources[1].read(parts[1]))


def test_names_that_are_not_utf8_are_rejects(tmp_path: Any) -> None:
    try:
        with open(os.fsencode(str(tmp_path)) + b"/\xff.png", "wb") as file:
            file.write(picture(0))
    except OSError:
        pytest.skip("this filesystem takes UTF-8 names only")
    fill(str(tmp_path), ["a.png"])
    assert list(rejects(samples(make(str(tmp_path))))) == ["\\xff.png"]


def test_abandoned_reading_stops(tmp_path: Any) -> None:
    source = make(fill(str(tmp_path), [f"{number:03d}.png" for number in range(60)]))
    part = max(
        (part for scan in scans(source) for part in scan.fragments), key=lambda part: part.samples
    )
    stream = source.read(part)
    next(stream)
    stream.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("raypipe-read")
    ]


def test_nothing_there(place: str) -> None:
    storage.write_bytes(f"{place}/set/a.csv", b"1")
    storage.write_bytes(f"{place}/set/b.csv", b"1")
    for uri, options, words in (
        (f"{place}/none", {}, "no such file or folder"),
        (f"{place}/set", {}, r"no .jpg or .* files among 2 files \(2 .csv\)"),
        (
            f"{place}/set",
            {"include": "*.png"},
            r"none of 2 files matches source.include = '\*.png', such as [ab]\.csv; correct it$",
        ),
        (f"{place}/set/*.png", {}, "no files here"),
    ):
        with pytest.raises(SourceError, match=words):
            list(make(uri, format="imagefolder", **options).files())


def test_a_bucket_that_is_not_there(s3: str) -> None:
    with pytest.raises(SourceError, match=r"s3://no-such-bucket/x: .*bucket does not exist"):
        list(make("s3://no-such-bucket/x", format="imagefolder").files())
