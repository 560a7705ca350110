"""Write the files of an export piece by piece, unless files with other content exist."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import IO, Any

from raypipe import storage
from raypipe.errors import RunError

FileWriter = Callable[[IO[bytes]], object]
"""Writes the content of a file. It writes the same each time it is called."""


def write_files(files: Mapping[str, FileWriter], force: bool) -> int:
    """Write all files by URI, and return their bytes.

    Raises
    ------
    RunError
        If a file exists with other content and `force` is not set; nothing is written then.
    """
    if not force:
        for uri, write in files.items():
            if storage.exists(uri) and not _holds(uri, write):
                raise RunError(
                    f"{uri}: already exists with other content; give another name "
                    "(--force replaces it)"
                )
    for uri, write in files.items():
        with storage.Upload(uri) as file:
            write(file)
    return sum(storage.info(uri).size for uri in files)


class _Differs(Exception):
    """The file has other content."""


class _Comparison(io.RawIOBase):
    """A file that compares what is written to it with a stored one."""

    def __init__(self, stored: storage.Reader) -> None:
        self._stored = stored

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = bytes(data)
        if self._stored.read(len(content)) != content:
            raise _Differs
        return len(content)


def _holds(uri: str, write: FileWriter) -> bool:
    """Return whether a file already has the content that would be written."""
    with storage.open_read(uri) as stored:
        try:
            write(_Comparison(stored))  # type: ignore[arg-type]
        except _Differs:
            return False
        return not stored.read(1)
