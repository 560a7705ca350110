"""A path or URI -> filesystem: one code path for local disk, `file://` and `s3://` (through fsspec and s3fs).

Credentials, region and endpoint of S3 come from the usual AWS variables and files; nothing of them is kept.
Writes are atomic: a reader sees a whole file or none. Passing storage faults are retried with exponential
back-off and full jitter; a missing file, a denied access or a full disk is not, since waiting does not mend it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from raypipe import listing as _listing
from raypipe.errors import RaypipeError
from raypipe.listing import FileInfo
from raypipe.listing import file_info as _file_info
from raypipe.listing import hidden as _hidden
from raypipe.parquet_checks import read_checked

T = TypeVar("T")
U = TypeVar("U")

RETRIES = 8
"""Attempts at a storage request; with the delays below the last one starts after about a minute."""
MOST_JSON, MOST_TABLE = 64 << 20, 4 << 30
"""Bytes of a JSON and of a Parquet file that are read as a whole."""
FIRST_DELAY, LONGEST_DELAY = 0.25, 20.0  # seconds


@functools.cache
def _remote(protocol: str) -> fsspec.AbstractFileSystem:
    # A listing must show what other machines wrote a moment ago, so fsspec's own cache of listings is off.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in {"s3", "s3a"}:
        options["config_kwargs"] = {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"max_attempts": 5, "mode": "standard"},
        }
    try:
        return fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise RaypipeError(f"{protocol}:// is not supported here: {error}") from None


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URI and the path on it."""
    protocol, separator, rest = uri.partition("://")
    if not separator:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if protocol in {"file", "local"}:
        return LocalFileSystem(), os.path.abspath(rest)
    fs = _remote(protocol)
    return fs, fs._strip_protocol(uri)


def is_local(uri: str) -> bool:
    """Whether a path or URI is on this machine's disk."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of a path or URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def retrying(action: Callable[[], T], what: str) -> T:
    """Run `action`, again after passing faults. `what` names the URI in the error of the last attempt."""
    for attempt in range(RETRIES):
        try:
            return action()
        except Exception as error:
            if not _passing(error):
                if _from_network(error) and not isinstance(error, OSError):
                    raise OSError(f"{what}: {error}") from error  # such as no credentials at all
                raise
            if attempt == RETRIES - 1:
                raise OSError(f"{what}: storage still fails after {RETRIES} attempts: {error}") from error
            time.sleep(random.uniform(0, min(LONGEST_DELAY, FIRST_DELAY * 2**attempt)))
    raise AssertionError("unreachable")


# EINVAL and ENOSYS are what a request that S3 calls wrong (400, 412, 416, 501) becomes
_FINAL = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOSYS}
_FINAL_WORDS = ("expired", "invalidaccesskey", "signature", "access denied", "forbidden", "nosuchbucket", "credentials")
_FINAL_TYPES = {"ParamValidationError", "FileExpired"}  # a bad name; an object replaced while it is read


def _passing(error: Exception) -> bool:
    """Whether an error may be gone a moment later."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError):
        return False
    text = f"{type(error).__name__} {error}".lower()
    if any(word in text for word in _FINAL_WORDS) or type(error).__name__ in _FINAL_TYPES:
        return False
    if isinstance(error, OSError):
        return error.errno not in _FINAL
    return _from_network(error)


def _from_network(error: Exception) -> bool:
    # botocore, aiohttp and urllib3 have exception trees of their own for the network
    return type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp", "urllib3", "asyncio"}


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The content of a file, or of the bytes from `start` up to `end`. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    return retrying(lambda: fs.cat_file(path, start=start, end=end), uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file, so that a reader sees the old content or the new and never a part."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        retrying(lambda: fs.pipe_file(path, data), uri)  # an object store shows an object when it is complete
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)[:100]}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file that does not exist yet. False when it does: exactly one of many writers gets True."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    try:
        retrying(lambda: fs.pipe_file(path, data, mode="create"), uri)
        return True
    except OSError as error:
        words = ("PreconditionFailed", "pre-conditions", "ConditionalRequestConflict")
        if not isinstance(error, FileExistsError) and not any(word in str(error) for word in words):
            raise
        return read_bytes(uri) == data  # a request whose answer was lost was sent again and met its own file


def open_read(uri: str, block: int = 1 << 20) -> Reader:
    """A seekable file object that reads at least `block` bytes at a time, each request retried. The caller closes it."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return Reader(_Ranges(retrying(lambda: open(path, "rb", buffering=0), uri), uri), block)
    return Reader(_Ranges(retrying(lambda: fs.open(path, "rb", block_size=block, cache_type="none"), uri), uri), block)


class Reader(io.BufferedReader):
    """A stored file being read. `fault` is the storage fault that ended a read, if any.

    Libraries for file formats raise OSError for damaged content as well; `fault` tells the two apart.
    """

    raw: _Ranges

    @property
    def fault(self) -> Exception | None:
        return self.raw.fault

    def end_at(self, position: int) -> bool:
        """Go on as if the file ended after so many bytes. Whether it has more."""
        return self.raw.end_at(position)


class _Ranges(io.RawIOBase):
    """A stored file as a raw stream without read-ahead; every read is retried."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file, self._uri = file, uri
        self._whole = self._size = int(file.seek(0, os.SEEK_END))
        self._position = 0
        self.fault: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def end_at(self, position: int) -> bool:
        self._size = min(position, self._whole)
        return self._size < self._whole

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        try:
            data = retrying(lambda: self._fetch(length), self._uri)
        except Exception as error:
            self.fault = error
            raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, length: int) -> bytes:
        self._file.seek(self._position)
        return self._file.read(length)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class Upload:
    """A file written piece by piece; it appears only when the `with` block ends without an error."""

    def __init__(self, uri: str) -> None:
        self._fs, self._path = filesystem(uri)
        self._local = isinstance(self._fs, LocalFileSystem)

    def __enter__(self) -> IO[bytes]:
        if self._local:
            folder, base = os.path.split(self._path)
            os.makedirs(folder, exist_ok=True)
            self._temporary = os.path.join(folder, f".{base[:100]}.{uuid.uuid4().hex}")
            self._file: Any = open(self._temporary, "wb")
        else:
            self._file = self._fs.open(self._path, "wb", autocommit=False)
        return self._file

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: object) -> None:
        if kind is not None:
            with contextlib.suppress(Exception):  # the error under way is the one to see
                self._discard()
            return
        try:
            self._file.close()
            if self._local:
                os.replace(self._temporary, self._path)
            else:
                self._file.commit()
        except BaseException:
            with contextlib.suppress(Exception):
                self._discard()
            raise

    def _discard(self) -> None:
        if not self._local:
            try:
                self._file.discard()  # parts sent so far are removed
            finally:
                self._file.closed = True  # or it would send the rest when it is collected
            return
        try:
            self._file.close()
        finally:
            if os.path.exists(self._temporary):
                os.unlink(self._temporary)


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
    find = _listing.local_files if isinstance(fs, LocalFileSystem) else functools.partial(_listing.stored_files, fs)
    return find(path, functools.partial(retrying, what=uri))


def listing(uri: str) -> list[FileInfo]:
    """`walk` as a list, for folders of which it is known that they do not hold very many files."""
    return list(walk(uri))


def folders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted, of S3 those among its first 1,000 entries; hidden ones are left out."""
    fs, path = filesystem(uri)
    find = _listing.local_folders if isinstance(fs, LocalFileSystem) else functools.partial(_listing.stored_folders, fs)
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
            kind = "directory" if os.path.isdir(full) else "file" if os.path.exists(full) else "nothing"
        if full != path.rstrip("/") and kind != "nothing":
            result[name(full)] = None if kind == "directory" else _file_info(name(full), detail)
    return result


def glob_root(uri: str) -> str:
    """The part of a glob before its first wildcard, up to a slash; `uri` itself when it has no wildcard."""
    wild = min((position for position in map(uri.find, "*?[") if position >= 0), default=-1)
    return uri if wild < 0 else uri[:wild].rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def matching(uri: str) -> list[FileInfo]:
    """Files matching a glob (`*`, `?`, `[...]`, `**` for any depth), sorted; paths are relative to `glob_root`.

    Hidden files are left out.
    """
    fs, path = filesystem(uri)
    root = filesystem(glob_root(uri))[1]
    if isinstance(fs, LocalFileSystem):
        return list(_listing.local_matches(path, root, functools.partial(retrying, what=uri)))
    root = root.rstrip("/") + "/"
    found = {name: item for name, item in retrying(lambda: fs.glob(path, detail=True), uri).items() if item["type"] == "file"}
    files = [_file_info(full.removeprefix(root), detail) for full, detail in found.items() if not full.endswith("/")]
    return sorted(file for file in files if not _hidden(file.path))


def is_file(uri: str) -> bool:
    """Whether there is a file, not a folder, of this name."""
    fs, path = filesystem(uri)
    return retrying(lambda: fs.isfile(path), uri)


def delete(uri: str) -> None:
    """Remove a file or a folder with everything in it; nothing happens when it is not there."""
    fs, path = filesystem(uri)

    def action() -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    retrying(action, uri)


def read_whole(uri: str, most: int) -> bytes:
    """The content of a file of at most so many bytes. Raises FileNotFoundError, or RaypipeError for a larger one and for what is no file."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise RaypipeError(f"{uri}: is no file, but a folder, a pipe or a device")
    size = info(uri).size
    if size > most:
        raise RaypipeError(f"{uri}: {size:,} bytes, and {most:,} are the most that it can have; is it what it should be?")
    return read_bytes(uri)


def read_json(uri: str) -> Any:
    """A JSON file. Raises FileNotFoundError, or RaypipeError naming the file when it is not JSON, or far too large."""
    try:
        return json.loads(read_whole(uri, MOST_JSON))
    except (ValueError, RecursionError) as error:
        raise RaypipeError(f"{uri}: not valid JSON ({error}); was it cut off or edited?") from None


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a table. Raises FileNotFoundError, or RaypipeError naming the file when it is not Parquet."""
    data = read_whole(uri, MOST_TABLE)
    try:
        return read_checked(data, columns)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise RaypipeError(f"{uri}: not a readable Parquet file ({error}); delete it and run again to make it anew") from None


def write_table(
    uri: str, table: pa.Table, *, compression: str = "zstd", row_group_size: int | None = None, dictionary: bool = True
) -> None:
    """Write a Parquet file atomically. The bytes depend on nothing but the table.

    Without a dictionary, numbers that hardly repeat are written and read faster, and take less space.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=compression, row_group_size=row_group_size, use_dictionary=dictionary)
    write_bytes(uri, buffer.getvalue())


def ahead(function: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[tuple[T, U]]:
    """Every item with what the function makes of it, in order, so many of them at a time in threads."""
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


def iter_tables(uri: str, columns: list[str] | None = None, *, threads: int = 1) -> Iterator[tuple[str, pa.Table]]:
    """Name and table of every Parquet file directly in a folder, sorted by name, one at a time.

    With more threads, so many files are read ahead and held at once: what hides the delay of an object store.
    """
    files = sorted(file for file in names(uri) if file.endswith(".parquet"))
    if threads == 1:
        for file in files:
            yield file, read_table(join(uri, file), columns)
        return
    yield from ahead(lambda file: read_table(join(uri, file), columns), files, threads)
