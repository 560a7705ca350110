"""A path or URI -> filesystem: one code path for local disk, `file://` and `s3://` (through fsspec and s3fs).

Credentials, region and endpoint of S3 come from the usual AWS variables and files; nothing of them is kept.
Writes are atomic: a reader sees a whole file or none. Passing storage faults are retried with exponential
back-off and full jitter; a missing file, a denied access or a full disk is not, since waiting does not mend it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from raypipe.errors import RaypipeError
from raypipe.storage import listing as _listing
from raypipe.storage.faults import code_of, explaining, retrying
from raypipe.storage.fences import locked, passed
from raypipe.storage.listing import FileInfo
from raypipe.storage.listing import file_info as _file_info
from raypipe.storage.listing import hidden as _hidden
from raypipe.storage.places import _remote as _remote
from raypipe.storage.places import filesystem, is_local, join, name, single_attempt
from raypipe.storage.streams import Ranges as _Ranges
from raypipe.storage.streams import Reader, Upload
from raypipe.storage.streams import temporary_of as _temporary_of
from raypipe.storage.untrusted_parquet import read_checked

T = TypeVar("T")
U = TypeVar("U")

BIG = 64 << 20
"""From so many bytes on an object is sent in parts, so that a fault costs a part and not all of it."""
MOST_JSON, MOST_TABLE = 64 << 20, 4 << 30
"""Bytes of a JSON and of a Parquet file that are read as a whole."""
LOCAL_BLOCK = 64 << 10
"""Bytes of a local file read at a time. There is no delay to hide, what is skipped is not read, and larger memory is cleared anew for each file."""
READERS, LOCAL_READERS = 8, 2
"""Files that are read at a time: of an object store to hide its delay. A local disk has none, and more threads only wait for one another."""


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The content of a file, or of the bytes from `start` up to `end`. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    return retrying(lambda: fs.cat_file(path, start=start, end=end), uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file, so that a reader sees the old content or the new and never a part."""
    if is_local(uri):
        with explaining(uri, writing=True):
            _replace(uri, data)
    elif len(data) >= BIG:
        with Upload(uri) as file:
            file.write(data)
    else:
        _put(uri, data)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file that does not exist yet. False when it does: exactly one of many writers gets True."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        # a request whose answer was lost was sent again and met its own file
        return _put(uri, data, {"mode": "create"}) or read_bytes(uri) == data
    with explaining(uri, writing=True):
        temporary = _temporary_of(path)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            return True
        finally:
            _unlink(temporary)


def exchange_bytes(uri: str, old: bytes, new: bytes) -> bool:
    """Write a small file if it still holds `old`: of many writers that know `old`, exactly one gets True.

    On a local disk by a lock of its folder, on S3 by a conditional request (If-Match). An object store that refuses these is
    asked what the file holds just before it is written, and so are file systems without locks and others that fsspec knows.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with explaining(uri, writing=True), locked(os.path.dirname(path), exclusive=True):
            return _content(uri) == old and _replace(uri, new, fenced=False)
    try:
        etag = retrying(lambda: fs.info(path), uri).get("ETag") if hasattr(fs, "call_s3") else None
    except FileNotFoundError:
        return False
    if _content(uri) != old:
        return False
    if etag is None:
        return _put(uri, new)
    return _put(uri, new, {"IfMatch": etag}) or _content(uri) == new


def _content(uri: str) -> bytes | None:
    try:
        return read_bytes(uri, 0)  # one request; a read without a range asks for the size first
    except FileNotFoundError:
        return None


def _replace(uri: str, data: bytes, fenced: bool = True) -> bool:
    """Write a local file. Not `fenced`: whoever calls this has the folder locked."""
    path = filesystem(uri)[1]
    temporary = _temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with passed(uri) if fenced else contextlib.nullcontext():
            os.replace(temporary, path)
    except BaseException:
        _unlink(temporary)
        raise
    return True


def _unlink(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)


def _put(uri: str, data: bytes, condition: dict[str, str] | None = None) -> bool:
    """Write an object, which readers see when it is complete; False where it does not fulfil the condition.

    The fence is looked at before every attempt: between the first one and the last there is time for a run to be taken over.
    """
    fs, path = single_attempt(uri), filesystem(uri)[1]
    conditions = [condition or {}]

    def action() -> bool:
        with passed(uri):
            try:
                fs.pipe_file(path, data, **conditions[-1])
                return True
            except OSError as error:
                if isinstance(error, FileExistsError) or code_of(error) in (
                    "PreconditionFailed",
                    "412",
                ):
                    return False
                if (
                    conditions[-1]
                    and isinstance(error, FileNotFoundError)
                    and code_of(error) == "NoSuchKey"
                ):
                    return False
                if "IfMatch" in conditions[-1] and code_of(error) in ("NotImplemented", "501"):
                    conditions.append({})
                    return action()
                raise

    return retrying(action, uri, writing=True)


def open_read(uri: str, block: int = 1 << 20) -> Reader:
    """A seekable file object that reads at least `block` bytes at a time (LOCAL_BLOCK of a local file), each request retried.

    The caller closes it.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return Reader(
            _Ranges(retrying(lambda: open(path, "rb", buffering=0), uri), uri),
            min(block, LOCAL_BLOCK),
        )
    return Reader(
        _Ranges(
            retrying(lambda: fs.open(path, "rb", block_size=block, cache_type="none"), uri), uri
        ),
        block,
    )


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(uri)
    return retrying(lambda: fs.exists(path), uri)


def info(uri: str) -> FileInfo:
    """Size and stamp of one file. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    return _file_info(name(uri), retrying(lambda: fs.info(path), uri))


def walk(uri: str) -> Iterator[FileInfo]:
    """All files below a folder in the order of their paths, one after the other; none when there is no such folder.

    Hidden files are left out. Of an object store, several parts are listed at the same time. Raises OSError, naming a local folder
    that cannot be read.
    """
    fs, path = filesystem(uri)
    find = (
        _listing.local_files
        if isinstance(fs, LocalFileSystem)
        else functools.partial(_listing.stored_files, fs)
    )
    return find(path, functools.partial(retrying, what=uri))


def listing(uri: str) -> list[FileInfo]:
    """`walk` as a list, for folders of which it is known that they do not hold very many files."""
    return list(walk(uri))


def folders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted, of S3 those among its first 1,000 entries; hidden ones are left out."""
    fs, path = filesystem(uri)
    find = (
        _listing.local_folders
        if isinstance(fs, LocalFileSystem)
        else functools.partial(_listing.stored_folders, fs)
    )
    try:
        return find(path, functools.partial(retrying, what=uri))
    except (FileNotFoundError, NotADirectoryError):
        return []


def names(uri: str) -> set[str]:
    """Names of the files directly in a folder; empty when there is no such folder. Hidden files are left out."""
    fs, path = filesystem(uri)
    try:
        found = retrying(lambda: fs.ls(path, detail=False), uri)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {base for base in (name(full) for full in found) if not base.startswith(".")}


def entries(uri: str) -> dict[str, FileInfo | None]:
    """Everything directly in a folder by its name, hidden files too; None for folders. Empty when there is no such folder."""
    fs, path = filesystem(uri)
    try:
        found = retrying(lambda: fs.ls(path, detail=True), uri)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    result: dict[str, FileInfo | None] = {}
    for detail in found:
        full, kind = detail["name"].rstrip("/"), detail["type"]
        if detail.get("islink"):  # of which a listing does not say what it leads to
            kind = (
                "directory"
                if os.path.isdir(full)
                else "file"
                if os.path.exists(full)
                else "nothing"
            )
        if full != path.rstrip("/") and kind != "nothing":
            result[name(full)] = None if kind == "directory" else _file_info(name(full), detail)
    return result


def glob_root(uri: str) -> str:
    """The part of a glob before its first wildcard, up to a slash; `uri` itself when it has no wildcard."""
    wild = min((position for position in map(uri.find, "*?[") if position >= 0), default=-1)
    return (
        uri if wild < 0 else uri[:wild].rpartition("/")[0] or ("/" if uri.startswith("/") else ".")
    )


def matching(uri: str) -> list[FileInfo]:
    """Files matching a glob (`*`, `?`, `[...]`, `**` for any depth), sorted; paths are relative to `glob_root`.

    Hidden files are left out.
    """
    fs, path = filesystem(uri)
    root = filesystem(glob_root(uri))[1]
    if isinstance(fs, LocalFileSystem):
        return list(_listing.local_matches(path, root, functools.partial(retrying, what=uri)))
    root = root.rstrip("/") + "/"
    found = {
        name: item
        for name, item in retrying(lambda: fs.glob(path, detail=True), uri).items()
        if item["type"] == "file"
    }
    files = [
        _file_info(full.removeprefix(root), detail)
        for full, detail in found.items()
        if not full.endswith("/")
    ]
    return sorted(file for file in files if not _hidden(file.path))


def is_file(uri: str) -> bool:
    """Whether there is a file, not a folder, of this name."""
    fs, path = filesystem(uri)
    return retrying(lambda: fs.isfile(path), uri)


def delete(uri: str) -> None:
    """Remove a file or a folder with everything in it; nothing happens when it is not there."""
    fs, path = filesystem(uri)

    def action() -> None:
        with passed(uri), contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    retrying(action, uri, writing=True)


def read_whole(uri: str, most: int) -> bytes:
    """The content of a file of at most so many bytes. Raises FileNotFoundError, or RaypipeError for a larger one and for what is no file."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise RaypipeError(f"{uri}: is no file, but a folder, a pipe or a device")
    size = info(uri).size
    if size > most:
        raise RaypipeError(
            f"{uri}: {size:,} bytes, and {most:,} are the most that it can have; is it what it should be?"
        )
    return read_bytes(uri)


def read_json(uri: str) -> Any:
    """A JSON file. Raises FileNotFoundError, or RaypipeError naming the file when it is not JSON, or far too large."""
    try:
        return json.loads(read_whole(uri, MOST_JSON))
    except (ValueError, RecursionError) as error:
        raise RaypipeError(f"{uri}: not valid JSON ({error}); was it cut off or edited?") from None


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a table. Raises FileNotFoundError, or RaypipeError naming the file when it is not Parquet."""
    data = read_whole(uri, MOST_TABLE)
    try:
        return read_checked(data, columns)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise RaypipeError(
            f"{uri}: not a readable Parquet file ({error}); delete it and run again to make it anew"
        ) from None


def write_table(
    uri: str,
    table: pa.Table,
    *,
    compression: str = "zstd",
    row_group_size: int | None = None,
    dictionary: bool = True,
) -> None:
    """Write a Parquet file atomically. The bytes depend on nothing but the table.

    Without a dictionary, numbers that hardly repeat are written and read faster, and take less space.
    """
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression=compression,
        row_group_size=row_group_size,
        use_dictionary=dictionary,
    )
    write_bytes(uri, buffer.getvalue())


def ahead(
    function: Callable[[T], U], items: Iterable[T], where: str, threads: int = READERS
) -> Iterator[tuple[T, U]]:
    """Every item with what the function makes of it, in order, so many of them at a time in threads.

    where  URI of the files that it reads; of local ones no more than `LOCAL_READERS` are read at a time
    """
    threads = min(threads, LOCAL_READERS) if is_local(where) else threads
    with ThreadPoolExecutor(threads, thread_name_prefix="raypipe-read") as pool:
        waiting: deque[tuple[T, Future[U]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) == threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def iter_tables(
    uri: str, columns: list[str] | None = None, *, threads: int = 1
) -> Iterator[tuple[str, pa.Table]]:
    """Name and table of every Parquet file directly in a folder, sorted by name, one at a time.

    With more threads, so many files are read ahead and held at once: what hides the delay of an object store.
    """
    files = sorted(file for file in names(uri) if file.endswith(".parquet"))
    if threads == 1:
        for file in files:
            yield file, read_table(join(uri, file), columns)
        return
    yield from ahead(lambda file: read_table(join(uri, file), columns), files, uri, threads)
