"""Read and write single files. Writes are atomic: a reader sees a whole file or none."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from raypipe.storage.faults import code_of, explaining, retrying
from raypipe.storage.fences import locked, passed
from raypipe.storage.file_info import FileInfo, file_info
from raypipe.storage.places import filesystem, is_local, name, single_attempt
from raypipe.storage.streams import Ranges, Reader, Upload, temporary_of

MULTIPART_BYTES = 64 << 20
"""Objects of this size or more are uploaded in parts, so that a fault costs one part only."""
LOCAL_BLOCK = 64 << 10
"""Bytes of a local file to read at a time. A local disk has no latency to hide, skipped content is
never read, and a larger buffer would have to be cleared for each file."""


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return a file, or its bytes from `start` up to `end`. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    if start is None and end is None and isinstance(fs, LocalFileSystem):
        return retrying(lambda: _whole(path), uri)
    return retrying(lambda: fs.cat_file(path, start=start, end=end), uri)


def _whole(path: str) -> bytes:
    """Return a local file without seeking, which a pipe such as /dev/fd/63 does not allow."""
    with open(path, "rb") as file:
        return file.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file atomically: a reader sees the old content or the new, never a part."""
    if is_local(uri):
        with explaining(uri, writing=True):
            _replace(uri, data)
    elif len(data) >= MULTIPART_BYTES:
        with Upload(uri) as file:
            file.write(data)
    else:
        _put(uri, data)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file that does not exist yet. Exactly one of many concurrent writers gets True."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        # If the answer to a request is lost, the retry finds the file that the request created.
        return _put(uri, data, {"mode": "create"}) or read_bytes(uri) == data
    with explaining(uri, writing=True):
        temporary = temporary_of(path)
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
    """Write a small file if it still holds `old`. Exactly one of many concurrent writers gets True.

    Notes
    -----
    On a local disk this takes a lock of the folder, on S3, Google Cloud Storage and Azure a
    conditional request (If-Match, or ifGenerationMatch). Where
    neither is supported (object stores that refuse conditions, file systems without locks, other
    fsspec file systems), the content is compared just before the write.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with explaining(uri, writing=True), locked(os.path.dirname(path), exclusive=True):
            return _content(uri) == old and _replace(uri, new, fenced=False)
    try:
        unchanged = fs.unchanged(retrying(lambda: fs.info(path), uri)) if conditional(fs) else {}
    except FileNotFoundError:
        return False
    if _content(uri) != old:
        return False
    if not unchanged:
        return _put(uri, new)
    return _put(uri, new, unchanged) or _content(uri) == new


def conditional(fs: object) -> bool:
    """Return whether a file system can write under the condition that a file is unchanged."""
    return hasattr(fs, "unchanged")


def _content(uri: str) -> bytes | None:
    try:
        return read_bytes(uri, 0)  # one request; a read without a range asks for the size first
    except FileNotFoundError:
        return None


def _replace(uri: str, data: bytes, fenced: bool = True) -> bool:
    """Write a local file. With `fenced=False` the caller already holds the lock of the folder."""
    path = filesystem(uri)[1]
    temporary = temporary_of(path)
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


def _put(uri: str, data: bytes, condition: dict[str, Any] | None = None) -> bool:
    """Write an object in one request; return False if the condition does not hold.

    The fence is checked before every attempt, because another driver can take the run over between
    two attempts.
    """
    fs, path = single_attempt(uri), filesystem(uri)[1]
    # The last entry applies. A store that does not implement If-Match gets the request without it.
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
    """Open a file for reading. Every request is retried. The caller closes the file.

    Parameters
    ----------
    uri : str
        The file.
    block : int
        Minimum number of bytes to read at a time. At most `LOCAL_BLOCK` for a local file.

    Returns
    -------
    Reader
        A seekable binary file.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return Reader(
            Ranges(retrying(lambda: open(path, "rb", buffering=0), uri), uri),
            min(block, LOCAL_BLOCK),
        )
    remote = retrying(lambda: fs.open(path, "rb", block_size=block, cache_type="none"), uri)
    return Reader(Ranges(remote, uri), block)


def exists(uri: str) -> bool:
    """Return whether a file or folder exists."""
    fs, path = filesystem(uri)
    return retrying(lambda: fs.exists(path), uri)


def is_file(uri: str) -> bool:
    """Return whether a file (not a folder) of this name exists."""
    fs, path = filesystem(uri)
    return retrying(lambda: fs.isfile(path), uri)


def info(uri: str) -> FileInfo:
    """Return size and stamp of one file. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    return file_info(name(uri), retrying(lambda: fs.info(path), uri))


def modified(uri: str) -> datetime:
    """Return when a file was last written, in UTC. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    return retrying(lambda: fs.modified(path), uri).astimezone(UTC)


def delete(uri: str) -> None:
    """Delete a file, or a folder with all its content. A missing file is no error."""
    fs, path = filesystem(uri)

    def action() -> None:
        with passed(uri), contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    retrying(action, uri, writing=True)


def missing_bucket(uri: str) -> str:
    """Return the bucket of a URI if it does not exist; "" otherwise, or if that is unknown."""
    if is_local(uri) or uri.lower().startswith(("http://", "https://")):
        return ""
    fs, path = filesystem(uri)
    bucket = path.partition("/")[0]
    try:
        return "" if not bucket or fs.exists(bucket) else bucket
    except Exception:  # without permission to look, the bucket can exist
        return ""
