"""What the file-based sources share: finding their files, what a stored label means, and telling damage from storage faults."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.storage import FileInfo, Reader

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
EXTENSIONS = {"parquet": (".parquet",), "webdataset": (".tar", ".tar.gz", ".tgz"), "imagefolder": IMAGE_EXTENSIONS}
"""File name endings by format, compared without regard to case."""


class Location:
    """Where a source's files are. `uri` is a folder, one file or a glob.

    Relative paths are relative to the folder, to the part of a glob before its first wildcard, or to the file's folder.
    Making the object touches no storage.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self._include = settings.include
        self._uri = settings.uri

    def listing(self) -> list[FileInfo]:
        """Every file, sorted by path, that `include` lets through. Raises SourceError when nothing can be listed."""
        try:
            if self._is_glob:
                found = storage.matching(self._uri)
            else:
                found = storage.listing(self._uri)
                if not found and storage.is_file(self._uri):
                    found = [storage.info(self._uri)]
                elif not found and not storage.exists(self._uri):
                    raise SourceError(f"{self._uri}: no such file or folder; set source.uri")
        except (OSError, ValueError) as error:
            raise SourceError(f"{self._uri}: cannot be listed: {_words(error)}") from None
        kept = [file for file in found if fnmatch.fnmatchcase(file.path, self._include)]
        if not kept:
            reason = f"none of {len(found)} files matches source.include = {self._include!r}" if found else "no files here"
            raise SourceError(f"{self._uri}: {reason}")
        return [FileInfo(text(file.path), file.size, file.stamp) for file in kept]

    def files(self, format: str) -> list[FileInfo]:
        """The files of a format, sorted. One file given by its own name counts whatever it is called. Raises SourceError."""
        listed = self.listing()
        found = [file for file in listed if file.path.lower().endswith(EXTENSIONS[format])]
        if not found and len(listed) == 1 and listed[0].path == text(storage.name(self._uri)):
            found = listed
        if not found:
            raise SourceError(f"{self._uri}: no {' or '.join(EXTENSIONS[format])} files among {describe(listed)}")
        return found

    def uri(self, path: str) -> str:
        """The URI of a relative path."""
        if path == storage.name(self._uri) and self._is_file:
            return self._uri
        return storage.join(storage.glob_root(self._uri) if self._is_glob else self._uri, path)

    def stream(self) -> Iterator[FileInfo]:
        """`listing`, of a folder one file after the other as they are found."""
        found = iter(()) if self._is_glob else self._walk()
        first = next(found, None)
        if first is None:
            yield from self.listing()
            return
        every = self._include == "*"
        for file in itertools.chain([first], found):
            if every or fnmatch.fnmatchcase(file.path, self._include):
                yield file if file.path.isascii() else FileInfo(text(file.path), file.size, file.stamp)

    def of_format(self, format: str) -> Iterator[FileInfo]:
        """`files`, of a folder one file after the other as they are found."""
        found = False
        for file in self.stream():
            if file.path.lower().endswith(EXTENSIONS[format]):
                found = True
                yield file
        if not found:
            yield from self.files(format)

    def folders(self) -> list[str]:
        """Names of the folders directly in `uri`; none where it is a file or a glob. Raises SourceError."""
        try:
            return [] if self._is_glob else storage.folders(self._uri)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self._uri}: cannot be listed: {_words(error)}") from None

    def _walk(self) -> Iterator[FileInfo]:
        try:
            yield from storage.walk(self._uri)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self._uri}: cannot be listed: {_words(error)}") from None

    @functools.cached_property
    def _is_glob(self) -> bool:
        return storage.glob_root(self._uri) != self._uri and not storage.exists(self._uri)

    @functools.cached_property
    def _is_file(self) -> bool:
        return storage.is_file(self._uri)


def describe(files: list[FileInfo]) -> str:
    """Such as "12 files (9 .csv, 3 .txt)"."""
    endings = Counter(os.path.splitext(file.path)[1].lower() or "without an ending" for file in files)
    listed = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(4)) + (", ..." if len(endings) > 4 else "")
    return f"{len(files)} file{'s' * (len(files) != 1)} ({listed})"


def stored_label(value: Any) -> tuple[int | str | None, str]:
    """A label as stored -> (number, name or None, ""), or (None, why it cannot be one).

    Whole numbers stored as floating point are numbers; null, NaN and blank text are missing labels.
    """
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value)):
        return None, ""
    if isinstance(value, str):
        return text(value), ""
    if isinstance(value, int):  # bool is one
        return int(value), ""
    if isinstance(value, float) and value.is_integer():
        return int(value), ""
    shown = repr(value)
    return None, f"label is not a number or a name: {shown if len(shown) <= 60 else shown[:60] + '...'}"


def damage(file: Reader, error: BaseException) -> str:
    """The reject reason for content that cannot be read. Raises the storage fault where that was the cause."""
    if file.fault is not None:
        raise file.fault
    if isinstance(error, MemoryError):
        return "more memory is needed than there is"
    return _words(error)


def text(name: str) -> str:
    """Text that can be written as UTF-8: bytes of file names that are no UTF-8, and lone surrogates, are shown escaped."""
    if name.isascii():
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode()


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
