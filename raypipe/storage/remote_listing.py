"""List the files below a folder of an object store in path order, several parts in parallel.

An object store answers in pages of 1,000 keys, and each page takes tens of milliseconds. Ranges of
keys are therefore listed in parallel and merged in order. The whole listing is never held in
memory.

Some stores that speak the protocol of S3 ignore parts of it. One that ignores where a listing
should start is listed in one piece. Whatever a store does, every key has to be greater than the one
before it, so that no file can be counted twice.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from raypipe.errors import StorageError
from raypipe.storage.file_info import FileInfo, file_info, hidden, hidden_name
from raypipe.storage.local_listing import Retry

PAGE = 1000
"""Keys in one answer of an object store. S3 returns no more."""
THREADS = 16
"""Parallel requests to an object store."""
RANGES = 8 * THREADS
"""Maximum number of key ranges. Many ranges even out their sizes, but each range ends with a page
of which a part is thrown away."""
PAGES_AHEAD = 4
"""Pages of one range that are read ahead. At most `2 * THREADS` ranges are open at once."""

Pages = Iterator[list[FileInfo]]


def stored_files(fs: Any, path: str, retry: Retry, with_hidden: bool = False) -> Iterator[FileInfo]:
    """Yield every file below a folder of an object store; nothing if the folder does not exist.

    Folder markers are left out, and so are hidden files by default.

    Raises
    ------
    StorageError
        If the store lists a key out of order, twice, or from another folder.
    """
    parts = _ranges(fs, path, retry) if _lists_pages(fs) else _folders(fs, path, retry)
    return (
        file
        for file in _checked(_in_order(parts), path)
        if file.path and not file.path.endswith("/") and (with_hidden or not hidden(file.path))
    )


def stored_folders(fs: Any, path: str, retry: Retry) -> list[str]:
    """Return the sorted names of the visible folders directly in a folder of an object store.

    Of an object store, only those among the first `PAGE` entries are returned.
    """
    if _lists_pages(fs):
        bucket, prefix = _bucket_and_prefix(fs, path)
        answer = _list_objects(fs, bucket, prefix, "/", "", retry)
        folders = [item["Prefix"] for item in answer.get("CommonPrefixes", [])]
    else:
        entries = _entries(fs, path, retry)
        folders = [item["name"] for item in entries if item["type"] == "directory"]
    names = (folder.rstrip("/").rsplit("/", 1)[-1] for folder in folders)
    return sorted(name for name in names if not hidden_name(name))


def _lists_pages(fs: Any) -> bool:
    """Return whether a store lists keys page by page: S3, Google Cloud Storage, Azure."""
    return hasattr(fs, "call_s3") or hasattr(fs, "list_page")


@dataclass(frozen=True)
class _KeyRange:
    """A range of the keys in a bucket.

    Attributes
    ----------
    bucket, prefix : str
        The bucket, and what all keys start with.
    root_length : int
        Characters to remove from the front of each key to get its relative path.
    after, until : str
        The range excludes keys up to `after` and keys from `until` on. "" means no bound.
    """

    bucket: str
    prefix: str
    root_length: int
    after: str
    until: str

    def pages(self, fs: Any, retry: Retry) -> Pages:
        """Yield the keys of the range in pages."""
        token, after, more = "", self.after, True
        while more:
            answer = _list_objects(fs, self.bucket, self.prefix, "", token, retry, after)
            contents = answer.get("Contents", [])
            for item in contents:
                if not item["Key"].startswith(self.prefix):
                    raise _bad_listing(f"{self.bucket}/{self.prefix}", item["Key"], "elsewhere")
            page = [item for item in contents if not self.until or item["Key"] < self.until]
            yield [
                FileInfo(
                    item["Key"][self.root_length :],
                    int(item["Size"]),
                    str(item.get("ETag") or item["LastModified"]).strip('"'),
                )
                for item in page
            ]
            token = answer.get("NextContinuationToken", "")
            after = page[-1]["Key"] if page else after  # used if the store gives no token
            more = bool(answer.get("IsTruncated")) and len(page) == len(contents)


def _ranges(fs: Any, path: str, retry: Retry) -> list[Callable[[], Pages]]:
    """Split the keys below a folder at the folders of the first level that has several."""
    bucket, prefix = _bucket_and_prefix(fs, path)
    root, bounds = prefix, [prefix]
    while len(bounds) == 1:
        folders: list[str] = []
        files, token = 0, ""
        answer: dict[str, Any] = {"IsTruncated": True}
        # With few folders among many files, this would list everything, one page after the other.
        while answer.get("IsTruncated") and len(folders) >= files:
            answer = _list_objects(fs, bucket, bounds[0], "/", token, retry)
            listed = [item["Prefix"] for item in answer.get("CommonPrefixes", [])]
            if folders and listed and listed[0] <= folders[-1]:
                raise _bad_listing(path, listed[0], f"after {folders[-1]!r}")
            folders += listed
            files += sum(item["Key"] != bounds[0] for item in answer.get("Contents", []))
            token = answer.get("NextContinuationToken", "")
        if len(folders) != 1 or files:
            step = max(1, -(-len(folders) // RANGES))
            bounds = ["", *folders[step::step]]
            if len(bounds) > 1 and not _starts_after(fs, bucket, prefix, bounds[1], retry):
                bounds = [""]
            break
        bounds = folders
    return [
        functools.partial(_KeyRange(bucket, prefix, len(root), after, until).pages, fs, retry)
        for after, until in zip(bounds, [*bounds[1:], ""])
    ]


def _starts_after(fs: Any, bucket: str, prefix: str, key: str, retry: Retry) -> bool:
    """Return whether the store can start a listing after a key."""
    answer = _list_objects(fs, bucket, prefix, "", "", retry, key, limit=1)
    return all(item["Key"] > key for item in answer.get("Contents", []))


def _checked(files: Iterator[FileInfo], folder: str) -> Iterator[FileInfo]:
    """Yield the files. Raises StorageError unless every path is greater than the one before it."""
    last: str | None = None
    for file in files:
        if last is not None and file.path <= last:
            raise _bad_listing(folder, file.path, f"after {last!r}")
        last = file.path
        yield file


def _bad_listing(folder: str, key: str, where: str) -> StorageError:
    return StorageError(
        f"{folder}: the store lists {key!r} {where}, but listings have to be in the order of the "
        "keys, each key once; files could be counted twice or missed. Use another store, or give "
        "a list of files as source.uri"
    )


def _list_objects(
    fs: Any,
    bucket: str,
    prefix: str,
    delimiter: str,
    token: str,
    retry: Retry,
    after: str = "",
    limit: int | None = None,
) -> dict[str, Any]:
    """Return one page of keys, as S3 answers `ListObjectsV2`."""
    arguments = {
        "Prefix": prefix,
        "Delimiter": delimiter,
        "ContinuationToken": token,
        "StartAfter": after if not token else "",
    }
    if hasattr(fs, "list_page"):
        start = after if not token else ""
        return retry(lambda: fs.list_page(bucket, prefix, delimiter, token, start, limit or PAGE))
    non_empty = {key: value for key, value in arguments.items() if value}
    return retry(
        lambda: fs.call_s3(
            "list_objects_v2", Bucket=bucket, MaxKeys=limit or PAGE, **non_empty, **fs.req_kw
        )
    )


def _bucket_and_prefix(fs: Any, path: str) -> tuple[str, str]:
    bucket, key, _ = fs.split_path(path)
    return bucket, f"{key.rstrip('/')}/" if key else ""


def _folders(fs: Any, path: str, retry: Retry) -> list[Callable[[], Pages]]:
    """Split the files of a store that does not list page by page.

    The files of the first level are listed directly, each folder of that level as a whole.
    """
    root = path.rstrip("/") + "/"

    def page(items: Sequence[dict[str, Any]]) -> Pages:
        yield [file_info(item["name"].removeprefix(root), item) for item in items]

    def below(folder: str) -> Pages:
        files = retry(lambda: fs.find(folder, detail=True))
        yield from page([files[name] for name in sorted(files)])

    entries = [item for item in _entries(fs, path, retry) if item["name"] != path]
    entries.sort(key=lambda item: item["name"].rstrip("/") + "/" * (item["type"] == "directory"))
    parts: list[Callable[[], Pages]] = []
    for is_folder, group in groupby(entries, lambda item: item["type"] == "directory"):
        items = list(group)
        parts += (
            [functools.partial(below, item["name"]) for item in items]
            if is_folder
            else [functools.partial(page, items)]
        )
    return parts


def _entries(fs: Any, path: str, retry: Retry) -> list[dict[str, Any]]:
    try:
        return retry(lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []


class _ReadAhead:
    """Reads one part of a listing in a thread, a few pages ahead of the consumer."""

    def __init__(self, part: Callable[[], Pages], stop: threading.Event) -> None:
        self._part, self._stop = part, stop
        self._queue: queue.Queue[list[FileInfo] | Exception | None] = queue.Queue(PAGES_AHEAD)

    def run(self) -> None:
        """Read all pages. Runs in a thread; `None` marks the end, an exception a failure."""
        try:
            for page in self._part():
                self._put(page)
                if self._stop.is_set():
                    return
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, item: list[FileInfo] | Exception | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def pages(self) -> Pages:
        """Yield the pages. Raises what the listing raised."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


def _in_order(parts: Sequence[Callable[[], Pages]]) -> Iterator[FileInfo]:
    """Yield the files of all parts in order, while the parts that follow are read ahead."""
    if len(parts) == 1:
        for page in parts[0]():
            yield from page
        return
    stop = threading.Event()
    open_parts: deque[_ReadAhead] = deque()
    unopened = iter(parts)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="raypipe-list") as pool:
        try:
            while True:
                # Parts are submitted in order, so the first open part always has a thread:
                # waiting for it cannot deadlock.
                while len(open_parts) < 2 * THREADS and (part := next(unopened, None)) is not None:
                    open_parts.append(_ReadAhead(part, stop))
                    pool.submit(open_parts[-1].run)
                if not open_parts:
                    return
                for page in open_parts[0].pages():
                    yield from page
                open_parts.popleft()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
