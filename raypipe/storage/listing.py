"""Every file below a folder, in the order of the paths, one after the other: a listing of millions is never held as a whole.

A local folder is read in the order of its names, so that no more is held than the names of the folders on the way down. An object
store answers in pages of 1,000 keys, each of which takes tens of milliseconds: ranges of keys are listed side by side.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import queue
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple

PAGE = 1000
"""Keys in one answer of an object store; S3 gives no more."""
THREADS = 16
"""Requests to an object store at the same time."""
RANGES = 8 * THREADS
"""Ranges of keys, at most: many even out their sizes, and each ends with a page that is partly thrown away."""
PAGES_AHEAD = 4
"""Pages of one range that wait to be taken; `2 * THREADS` ranges wait at once."""

Again = Callable[[Callable[[], Any]], Any]
"""Runs a request to storage, again after passing faults."""


class FileInfo(NamedTuple):
    """One stored file: `path` relative to the listed folder, `size` in bytes, `stamp` an ETag or a time of change."""

    path: str
    size: int
    stamp: str


def hidden(path: str) -> bool:
    """Whether a file or one of its folders has a name that begins with a dot."""
    return path.startswith(".") or "/." in path


# -- local folders --------------------------------------------------------------------------------------------------


def local_files(
    root: str, again: Again, wanted: Callable[[str], bool] | None = None
) -> Iterator[FileInfo]:
    """Every file below a local folder; none when there is no such folder. Raises OSError naming a folder that cannot be read.

    Links are followed, to folders as well, unless one leads back to a folder it lies in. Hidden files and folders, a `lost+found` at
    the top, pipes, sockets and devices are left out; a link that leads nowhere is a file of 0 bytes.
    wanted  relative path of a folder -> whether to look into it
    """
    yield from _below(root, "", [], again, wanted or (lambda folder: True))


def local_folders(root: str, again: Again) -> list[str]:
    """Names of the folders directly in a local folder, sorted; hidden ones are left out. Raises OSError."""
    return [name[:-1] for name in _names(root, again) if name.endswith("/")]


def local_matches(pattern: str, root: str, again: Again) -> Iterator[FileInfo]:
    """The local files that match a glob, with paths relative to `root`, its part before the first wildcard. Raises OSError.

    Only folders are looked into that a part of the glob matches.
    """
    parts = pattern.removeprefix(root.rstrip("/") + "/").split("/")
    found = local_files(root, again, lambda folder: _leads_on(folder.split("/"), parts))
    return (file for file in found if _matches(file.path.split("/"), parts))


def _matches(names: list[str], parts: list[str]) -> bool:
    """Whether the names between the slashes of a path match the parts of a glob."""
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        return len(parts) == 1 or any(
            _matches(names[start:], parts[1:]) for start in range(len(names))
        )
    return fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def _leads_on(names: list[str], parts: list[str]) -> bool:
    """Whether something below a folder can match."""
    if not parts or not names or parts[0] == "**":
        return bool(parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _leads_on(names[1:], parts[1:])


def _below(
    folder: str,
    prefix: str,
    above: list[tuple[int, int]],
    again: Again,
    wanted: Callable[[str], bool],
) -> Iterator[FileInfo]:
    try:
        names = _names(folder, again)
        about = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return  # nothing there, or gone since its parent was read
    place = (about.st_dev, about.st_ino)
    if place in above:
        return
    for name in names:
        path = f"{folder.rstrip('/')}/{name}"
        if not name.endswith("/"):
            with contextlib.suppress(FileNotFoundError):
                found = again(functools.partial(_stat, path))
                if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
                    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
                    yield FileInfo(prefix + name, size, str(found.st_mtime))
        elif wanted(prefix + name[:-1]) and not (name == "lost+found/" and not prefix):
            yield from _below(path[:-1], prefix + name, [*above, place], again, wanted)


def _names(folder: str, again: Again) -> list[str]:
    """Names in a folder, folders with a slash at the end: sorted like this, whole paths come in their order."""

    def read() -> list[str]:
        with os.scandir(folder) as entries:
            return [
                entry.name + "/" * _is_folder(entry)
                for entry in entries
                if not entry.name.startswith(".")
            ]

    return sorted(again(read))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:
        return os.lstat(path)  # a link that leads nowhere; else the same error again


# -- object stores --------------------------------------------------------------------------------------------------


def stored_files(fs: Any, path: str, again: Again) -> Iterator[FileInfo]:
    """Every file below a folder of an object store, hidden ones and markers of folders left out; none when there is no such folder."""
    jobs = _ranges(fs, path, again) if hasattr(fs, "call_s3") else _folders(fs, path, again)
    return (
        file
        for file in _in_order(jobs)
        if file.path and not file.path.endswith("/") and not hidden(file.path)
    )


def stored_folders(fs: Any, path: str, again: Again) -> list[str]:
    """Names of the folders directly in a folder of an object store, sorted, of S3 those among its first `PAGE` entries."""
    if hasattr(fs, "call_s3"):
        bucket, prefix = _bucket_and_prefix(fs, path)
        found = [
            item["Prefix"]
            for item in _answer(fs, bucket, prefix, "/", "", again).get("CommonPrefixes", [])
        ]
    else:
        found = [item["name"] for item in _entries(fs, path, again) if item["type"] == "directory"]
    names = (full.rstrip("/").rsplit("/", 1)[-1] for full in found)
    return sorted(name for name in names if not name.startswith("."))


Pages = Iterator[list[FileInfo]]


def _ranges(fs: Any, path: str, again: Again) -> list[Callable[[], Pages]]:
    """The keys below a folder cut at folders of the first level that has several."""
    bucket, prefix = _bucket_and_prefix(fs, path)
    root, bounds = prefix, [prefix]
    while len(bounds) == 1:
        folders: list[str] = []
        files, token = 0, ""
        answer: dict[str, Any] = {"IsTruncated": True}
        # where there are hardly any folders, this would be a listing of everything, one page after the other
        while answer.get("IsTruncated") and len(folders) >= files:
            answer = _answer(fs, bucket, bounds[0], "/", token, again)
            folders += [item["Prefix"] for item in answer.get("CommonPrefixes", [])]
            files += sum(item["Key"] != bounds[0] for item in answer.get("Contents", []))
            token = answer.get("NextContinuationToken", "")
        if len(folders) != 1 or files:
            step = max(1, -(-len(folders) // RANGES))
            bounds = ["", *folders[step::step]]
            break
        bounds = folders
    return [
        functools.partial(_pages, fs, bucket, prefix, len(root), after, until, again)
        for after, until in zip(bounds, [*bounds[1:], ""])
    ]


def _pages(
    fs: Any, bucket: str, prefix: str, cut: int, after: str, until: str, again: Again
) -> Pages:
    """The keys that begin with `prefix`, after `after` and before `until`, in pages."""
    token, more = "", True
    while more:
        answer = _answer(fs, bucket, prefix, "", token, again, after)
        found = answer.get("Contents", [])
        page = [item for item in found if not until or item["Key"] < until]
        yield [
            FileInfo(
                item["Key"][cut:],
                int(item["Size"]),
                str(item.get("ETag") or item["LastModified"]).strip('"'),
            )
            for item in page
        ]
        token, more = (
            answer.get("NextContinuationToken", ""),
            bool(answer.get("IsTruncated")) and len(page) == len(found),
        )


def _answer(
    fs: Any, bucket: str, prefix: str, delimiter: str, token: str, again: Again, after: str = ""
) -> dict[str, Any]:
    asked = {
        "Prefix": prefix,
        "Delimiter": delimiter,
        "ContinuationToken": token,
        "StartAfter": after if not token else "",
    }
    given = {key: value for key, value in asked.items() if value}
    return again(
        lambda: fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=PAGE, **given, **fs.req_kw)
    )


def _bucket_and_prefix(fs: Any, path: str) -> tuple[str, str]:
    bucket, key, _ = fs.split_path(path)
    return bucket, f"{key.rstrip('/')}/" if key else ""


def _folders(fs: Any, path: str, again: Again) -> list[Callable[[], Pages]]:
    """Of an object store other than S3: the files of the first level as they are, and each of its folders whole."""
    root = path.rstrip("/") + "/"

    def page(items: Sequence[dict[str, Any]]) -> Pages:
        yield [file_info(item["name"].removeprefix(root), item) for item in items]

    def below(folder: str) -> Pages:
        found = again(lambda: fs.find(folder, detail=True))
        yield from page([found[name] for name in sorted(found)])

    entries = [item for item in _entries(fs, path, again) if item["name"] != path]
    entries.sort(key=lambda item: item["name"].rstrip("/") + "/" * (item["type"] == "directory"))
    jobs: list[Callable[[], Pages]] = []
    for is_folder, group in groupby(entries, lambda item: item["type"] == "directory"):
        items = list(group)
        jobs += (
            [functools.partial(below, item["name"]) for item in items]
            if is_folder
            else [functools.partial(page, items)]
        )
    return jobs


def _entries(fs: Any, path: str, again: Again) -> list[dict[str, Any]]:
    try:
        return again(lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []


def file_info(path: str, detail: dict[str, Any]) -> FileInfo:
    """From what fsspec says of a file."""
    stamp = (
        detail.get("ETag")
        or detail.get("etag")
        or detail.get("mtime")
        or detail.get("LastModified")
        or ""
    )
    return FileInfo(path, int(detail.get("size") or 0), str(stamp).strip('"'))


def _in_order(jobs: Sequence[Callable[[], Pages]]) -> Iterator[FileInfo]:
    """What the jobs give, in their order, while those that follow are under way; a job that is far ahead waits."""
    stop = threading.Event()
    if len(jobs) == 1:
        for page in jobs[0]():
            yield from page
        return

    def run(job: Callable[[], Pages], out: queue.Queue[Any]) -> None:
        def put(item: Any) -> None:
            while not stop.is_set():
                try:
                    out.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        try:
            for page in job():
                put(page)
                if stop.is_set():
                    return
            put(None)
        except Exception as error:
            put(error)

    queues: deque[queue.Queue[Any]] = deque()
    left = iter(jobs)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="raypipe-list") as pool:
        try:
            while True:
                # those before it have a thread each, so the first in line always has one: nobody waits in a circle
                while len(queues) < 2 * THREADS and (job := next(left, None)) is not None:
                    queues.append(queue.Queue(PAGES_AHEAD))
                    pool.submit(run, job, queues[-1])
                if not queues:
                    return
                item = queues[0].get()
                if item is None:
                    queues.popleft()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield from item
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
