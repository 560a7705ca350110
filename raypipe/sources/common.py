"""What the file-based sources share: finding their files, what a stored label means, and telling damage from storage faults."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
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

    def stream(self) -> Iterator[FileInfo]:
        """Every file that `include` lets through, in the order of the paths. Raises SourceError when nothing can be listed."""
        count, kept, every = 0, 0, self._include == "*"
        try:
            found = iter(storage.matching(self._uri)) if self._is_glob else storage.walk(self._uri)
            first = next(found, None)
            if first is None and not self._is_glob and storage.is_file(self._uri):
                first = storage.info(self._uri)
            elif first is None and not self._is_glob and not storage.exists(self._uri):
                raise SourceError(f"{self._uri}: no such file or folder; set source.uri")
            for file in itertools.chain([first] if first is not None else [], found):
                count += 1
                if every or fnmatch.fnmatchcase(file.path, self._include):
                    kept += 1
                    yield file if file.path.isascii() else FileInfo(text(file.path), file.size, file.stamp)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self._uri}: cannot be listed: {_words(error)}") from None
        if not kept:
            reason = f"none of {count} files matches source.include = {self._include!r}" if count else "no files here"
            raise SourceError(f"{self._uri}: {reason}")

    def listing(self) -> list[FileInfo]:
        """`stream` as a list."""
        return list(self.stream())

    def of_format(self, format: str) -> Iterator[FileInfo]:
        """The files of a format in the order of the paths. One file given by its own name counts whatever it is called.
        Raises SourceError."""
        found, others, last = False, Counter[str](), None
        for file in self.stream():
            if file.path.lower().endswith(EXTENSIONS[format]):
                found = True
                yield file
            elif not found:
                others[_ending(file)] += 1
                last = file
        if not found and last is not None and others.total() == 1 and last.path == text(storage.name(self._uri)):
            yield last
        elif not found:
            raise SourceError(f"{self._uri}: no {' or '.join(EXTENSIONS[format])} files among {_described(others)}")

    def files(self, format: str) -> list[FileInfo]:
        """`of_format` as a list."""
        return list(self.of_format(format))

    def folders(self) -> list[str]:
        """Names of the folders directly in `uri`; none where it is a file or a glob. Raises SourceError."""
        try:
            return [] if self._is_glob else storage.folders(self._uri)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self._uri}: cannot be listed: {_words(error)}") from None

    def uri(self, path: str) -> str:
        """The URI of a relative path."""
        if path == storage.name(self._uri) and self._is_file:
            return self._uri
        return storage.join(storage.glob_root(self._uri) if self._is_glob else self._uri, path)

    @functools.cached_property
    def _is_glob(self) -> bool:
        return storage.glob_root(self._uri) != self._uri and not storage.exists(self._uri)

    @functools.cached_property
    def _is_file(self) -> bool:
        return storage.is_file(self._uri)


def describe(files: Iterable[FileInfo]) -> str:
    """Such as "12 files (9 .csv, 3 .txt)"."""
    return _described(Counter(map(_ending, files)))


def _described(endings: Counter[str]) -> str:
    listed = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(4)) + (", ..." if len(endings) > 4 else "")
    return f"{endings.total()} file{'s' * (endings.total() != 1)} ({listed})"


def _ending(file: FileInfo) -> str:
    return os.path.splitext(file.path)[1].lower() or "without an ending"


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
