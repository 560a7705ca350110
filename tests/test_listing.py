"""Listings of many files: order, memory, and number of requests."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError, StorageError
from raypipe.sources import open_source
from raypipe.storage import FileInfo, remote_listing
from raypipe.storage.file_info import hidden


class Keys:
    """The S3 requests of a listing, answered from keys in memory.

    Counts the requests, and the largest number of concurrent ones. `ignored` are parts of the
    protocol that this store does not know.
    """

    def __init__(
        self, keys: list[str], seconds: float = 0.0, ignored: tuple[str, ...] = ()
    ) -> None:
        self.req_kw: dict[str, Any] = {}
        self.ignored = ignored
        self.keys, self.seconds = sorted(keys), seconds
        self.requests = self.busy = self.most = 0
        self._lock = threading.Lock()

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call_s3(
        self,
        method: str,
        Bucket: str,
        Prefix: str = "",
        Delimiter: str = "",
        MaxKeys: int = 1000,
        **given: str,
    ) -> Any:
        assert method == "list_objects_v2" and set(given) <= {"StartAfter", "ContinuationToken"}
        given = {name: value for name, value in given.items() if name not in self.ignored}
        Prefix = "" if "Prefix" in self.ignored else Prefix
        Delimiter = "" if "Delimiter" in self.ignored else Delimiter
        with self._lock:
            self.requests += 1
            self.busy += 1
            self.most = max(self.most, self.busy)
        time.sleep(self.seconds)
        after = given.get("ContinuationToken", given.get("StartAfter", ""))
        entries: dict[str, bool] = {}
        for key in self.keys:
            if key.startswith(Prefix):
                folder, slash, _ = (
                    key[len(Prefix) :].partition(Delimiter) if Delimiter else (key, "", "")
                )
                entries.setdefault(Prefix + folder + slash if slash else key, bool(slash))
        left = [entry for entry in entries if entry > after]
        page = left[:MaxKeys]
        with self._lock:
            self.busy -= 1
        answer: dict[str, Any] = {"IsTruncated": len(left) > len(page)}
        if len(left) > len(page) and "NextContinuationToken" not in self.ignored:
            answer["NextContinuationToken"] = page[-1]
        contents = [
            {"Key": key, "Size": len(key), "ETag": f'"{key}"'} for key in page if not entries[key]
        ]
        return answer | {
            "Contents": contents,
            "CommonPrefixes": [{"Prefix": key} for key in page if entries[key]],
        }


def at_once(action: Callable[[], Any]) -> Any:
    return action()


def listed(
    keys: list[str], folder: str = "bucket/root", **options: Any
) -> tuple[list[FileInfo], Keys]:
    fs = Keys(keys, **options)
    return list(remote_listing.stored_files(fs, folder, at_once)), fs


def some_keys(number: int) -> list[str]:
    draw = random.Random(number)
    parts = ["a", "b", "b-", "ab", "c.d", "é", ".h", "z"]
    keys = {"/".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(draw.randint(0, 60))}
    return (
        [f"root/{key}" for key in keys]
        + [f"root/{key}/" for key in list(keys)[:5]]
        + ["root2/x", "roo", "root/"]
    )


@pytest.mark.parametrize("page", [1, 3, 1000])
def test_every_key_comes_once_and_in_order(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_listing, "PAGE", page)
    for number in range(30):
        monkeypatch.setattr(remote_listing, "RANGES", number % 4 + 1)
        keys = some_keys(number)
        names = (key.removeprefix("root/") for key in keys if key.startswith("root/"))
        expected = sorted(
            name for name in names if name and not name.endswith("/") and not hidden(name)
        )
        found, _ = listed(keys)
        assert [file.path for file in found] == expected
        assert all(
            (file.size, file.stamp) == (len(f"root/{file.path}"), f"root/{file.path}")
            for file in found
        )
    assert [file.path for file in listed(["root/x"], "bucket")[0]] == ["root/x"]


def test_a_listing_takes_hardly_more_requests_than_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_listing, "PAGE", 10)
    monkeypatch.setattr(remote_listing, "RANGES", 8)
    many_folders = [f"root/{folder:03d}/{file}" for folder in range(300) for file in range(2)]
    flat = [f"root/{number:04d}" for number in range(600)]
    one_below_the_other = [f"root/only/one/{key.removeprefix('root/')}" for key in many_folders]
    for keys, first_level in ((many_folders, 30), (flat, 1), (one_below_the_other, 32)):
        found, fs = listed(keys)
        assert len(found) == 600 and fs.requests <= first_level + 60 + 8


def test_ranges_are_listed_side_by_side_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_listing, "PAGE", 5)
    keys = [f"root/{folder:02d}/{file:02d}" for folder in range(30) for file in range(10)]
    found, fs = listed(keys, seconds=0.002)
    assert [f"root/{file.path}" for file in found] == keys
    assert 4 < fs.most <= remote_listing.THREADS


def test_what_is_not_taken_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_listing, "PAGE", 2)
    monkeypatch.setattr(remote_listing, "RANGES", 1000)
    fs = Keys([f"root/{folder:03d}/{file:03d}" for folder in range(100) for file in range(40)])
    stream = remote_listing.stored_files(fs, "bucket/root", at_once)
    taken = list(itertools.islice(stream, 10))
    time.sleep(0.1)
    first_level = 50
    assert fs.requests <= first_level + 2 * remote_listing.THREADS * (
        remote_listing.PAGES_AHEAD + 2
    )
    assert [file.path for file in taken] == [f"000/{file:03d}" for file in range(10)]
    del stream  # closes it
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("raypipe-list")
    ]


def test_a_fault_in_a_range_ends_the_listing() -> None:
    fs = Keys([f"root/{folder:02d}/x" for folder in range(50)])

    def failing(action: Callable[[], Any]) -> Any:
        if fs.requests > 20:
            raise PermissionError("Access Denied")
        return action()

    with pytest.raises(PermissionError, match="Access Denied"):
        list(remote_listing.stored_files(fs, "bucket/root", failing))


@pytest.mark.parametrize(
    "ignored",
    [("StartAfter",), ("Delimiter",), ("StartAfter", "Delimiter"), ("NextContinuationToken",)],
)
@pytest.mark.parametrize("page", [5, 1000])
def test_a_store_that_ignores_parts_of_the_protocol(
    ignored: tuple[str, ...], page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_listing, "PAGE", page)
    keys = [f"root/{folder}/{number:02d}.jpg" for folder in "abc" for number in range(24)]
    found, _ = listed(keys, ignored=ignored)
    assert [f"root/{file.path}" for file in found] == keys


@pytest.mark.parametrize(
    ("ignored", "words"),
    [
        (("ContinuationToken",), "root: the store lists 'a/00.jpg' after 'a/04.jpg'"),
        (("ContinuationToken", "Delimiter"), "root: the store lists 'a/00.jpg' after 'a/04.jpg'"),
        (("StartAfter", "NextContinuationToken"), "root: the store lists 'a/00.jpg' after"),
        (("Prefix",), "root/: the store lists 'other/x.jpg' elsewhere"),
    ],
)
def test_a_listing_that_cannot_be_trusted_ends(
    ignored: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_listing, "PAGE", 5)
    keys = [f"root/{folder}/{number:02d}.jpg" for folder in "abc" for number in range(24)]
    with pytest.raises(StorageError, match=words):
        listed([*keys, "other/x.jpg"], ignored=ignored)


def test_folders_that_a_store_lists_again_end_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_listing, "PAGE", 5)
    keys = [f"root/{folder:02d}/x.jpg" for folder in range(20)]
    with pytest.raises(StorageError, match="root: the store lists 'root/00/' after 'root/04/'"):
        listed(keys, ignored=("ContinuationToken",))


def test_keys_out_of_order_end_the_listing() -> None:
    fs = Keys(["root/a", "root/b", "root/c"])
    fs.keys.reverse()
    with pytest.raises(StorageError, match="root: the store lists 'b' after 'c'"):
        list(remote_listing.stored_files(fs, "bucket/root", at_once))


def test_s3_in_pages(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["a/1", "a/2", "a/b/3", "a-/4", "b/ü 5", "c", "d/e/f/6"]
    for path in paths:
        storage.write_bytes(f"{s3}/paged/{path}", path.encode())
    whole = storage.listing(f"{s3}/paged")
    assert [file.path for file in whole] == sorted(paths) and [file.size for file in whole][
        -1
    ] == len("d/e/f/6")
    monkeypatch.setattr(remote_listing, "PAGE", 2)
    monkeypatch.setattr(remote_listing, "RANGES", 2)
    assert storage.listing(f"{s3}/paged") == whole
    assert storage.folders(f"{s3}/paged") == ["a", "a-"]  # of its first page


def test_an_object_store_other_than_s3() -> None:
    for path in ("b/2", "b/c/3", "b-/4", "a", "z", ".h/5", "b/.h"):
        storage.write_bytes(f"memory://bucket/root/{path}", b"x")
    assert [file.path for file in storage.walk("memory://bucket/root")] == [
        "a",
        "b-/4",
        "b/2",
        "b/c/3",
        "z",
    ]
    assert storage.folders("memory://bucket/root") == ["b", "b-"]
    assert storage.listing("memory://bucket/none") == [] == storage.folders("memory://bucket/none")


def tree(root: Path, paths: list[str]) -> str:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return str(root)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, ["a=1/x.png", "a=2/y.png", "a=3/z.png", "lost+found/w.png"])
    scandir = os.scandir

    def denying(path: str) -> Any:
        if str(path).endswith(("a=2", "lost+found")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denying)
    with pytest.raises(PermissionError, match="a=2"):
        storage.listing(root)
    for uri in (root, f"{root}/*/*.png"):
        with pytest.raises(SourceError, match=r"cannot be listed: .*Permission denied: '.*/a=2'"):
            list(open_source(SourceSettings(uri=uri, format="imagefolder")).files())
    assert [file.path for file in storage.matching(f"{root}/a=[13]/*")] == [
        "a=1/x.png",
        "a=3/z.png",
    ]  # not looked into


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", ["a/1"])
    tree(tmp_path / "other", ["2", "deep/3"])
    (tmp_path / "root/b").symlink_to(tmp_path / "other")
    (tmp_path / "root/a/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/c").symlink_to(tmp_path / "other/2")
    (tmp_path / "root/d").symlink_to(tmp_path / "gone")
    (tmp_path / "root/e").symlink_to(tmp_path / "root/e")
    os.mkfifo(tmp_path / "root/f")
    assert [(file.path, file.size) for file in storage.listing(root)] == [
        ("a/1", 1),
        ("b/2", 1),
        ("b/deep/3", 1),
        ("c", 1),
        ("d", 0),
        ("e", 0),
    ]
    assert [file.path for file in storage.matching(f"{root}/*")] == ["c", "d", "e"]
    assert storage.folders(root) == ["a", "b"]
    assert storage.listing(f"{root}/a/1") == []


def test_local_order_is_that_of_whole_paths(tmp_path: Path) -> None:
    for number in range(10):
        keys = [key.rstrip("/") + "/f" for key in some_keys(number)]
        root = tree(tmp_path / str(number), keys)
        found = [file.path for file in storage.listing(root)]
        assert found == sorted(key for key in set(keys) if not hidden(key))
