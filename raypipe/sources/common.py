"""What the file-based sources share: finding their files, what a stored label means, and telling damage from storage faults."""

from __future__ import annotations

import abc
import fnmatch
import functools
import itertools
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources import patterns
from raypipe.sources.base import FileScan, Source, SourceFile
from raypipe.storage import FileInfo, Reader

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
EXTENSIONS = {
    "parquet": (".parquet",),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "imagefolder": IMAGE_EXTENSIONS,
}
"""File name endings by format, compared without regard to case."""
LIST = ".txt"
"""File name ending of a list of files."""


MISSING = "missing"
"""The stamp of a file that a pattern or a list names and that is not there."""
LISTERS = 16
"""Folders listed at the same time."""
_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")


class Location:
    """Where a source's files are. `uri` is a folder, one file, a glob, a brace pattern, or a list: a .txt file with a name a line.

    Relative paths are relative to the folder, to the part of a glob or pattern before its first wildcard or brace, to the file's
    folder or to the list's; what a list names elsewhere keeps its whole path or URI. Making the object touches no storage.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self._include = settings.include
        self._uri = settings.uri

    def listing(self) -> list[FileInfo]:
        """Every file, sorted by path, that `include` lets through. Raises SourceError when nothing can be listed.

        A file that a pattern or a list names and that is not there has the stamp `MISSING`; where none is there, that is an error.
        """
        return self._listing()[0]

    def files(self, format: str) -> list[FileInfo]:
        """The files of a format, sorted. A file given by its own name counts whatever it is called. Raises SourceError."""
        listed, named = self._listing()
        found = [
            file
            for file in listed
            if file.path in named or file.path.lower().endswith(EXTENSIONS[format])
        ]
        if all(file.stamp == MISSING for file in found):
            raise SourceError(
                f"{self._uri}: no {' or '.join(EXTENSIONS[format])} files among {describe(listed)}"
            )
        return found

    def uri(self, path: str) -> str:
        """The URI of a relative path."""
        if "://" in path or path.startswith("/"):
            return path
        if self._is_list:
            return storage.join(_folder(self._uri), path)
        if path == storage.name(self._uri) and self._is_file:
            return self._uri
        if self._is_pattern:
            return storage.join(self._root or "", path)
        return storage.join(storage.glob_root(self._uri) if self._is_glob else self._uri, path)

    def _listing(self) -> tuple[list[FileInfo], set[str]]:
        """The files that `include` lets through, and the paths of those that are given by their own names."""
        try:
            found, named = self._found()
        except (OSError, ValueError) as error:
            raise SourceError(f"{self._uri}: cannot be listed: {_words(error)}") from None
        kept = [file for file in found if fnmatch.fnmatchcase(file.path, self._include)]
        if not kept:
            reason = (
                f"none of {len(found)} files matches source.include = {self._include!r}"
                if found
                else "no files here"
            )
            raise SourceError(f"{self._uri}: {reason}")
        if all(file.stamp == MISSING for file in kept):
            raise SourceError(
                f"{self._uri}: none of the {len(kept)} files it names is there, such as {text(kept[0].path)}"
            )
        return [FileInfo(text(file.path), file.size, file.stamp) for file in kept], {
            text(path) for path in named
        }

    def _found(self) -> tuple[list[FileInfo], set[str]]:
        if self._is_list:
            return self._named(_listed(self._uri), _folder(self._uri))
        if self._is_pattern:
            names = [
                self._literal + rest for rest in patterns.expand(self._uri[len(self._literal) :])
            ]
            globs = {name for name in names if _wild(name[len(self._literal) :]) >= 0}
            found, named = self._named([name for name in names if name not in globs], self._root)
            with ThreadPoolExecutor(LISTERS, thread_name_prefix="raypipe-list") as threads:
                for glob, matches in zip(globs, threads.map(storage.matching, globs), strict=True):
                    folder = storage.glob_root(glob)
                    for file in matches:
                        path = _relative(storage.join(folder, file.path), self._root)
                        found.append(FileInfo(path, file.size, file.stamp))
            return sorted(
                {file.path: file for file in found}.values(), key=lambda file: file.path
            ), named
        if self._is_glob:
            return storage.matching(self._uri), set()
        found = storage.listing(self._uri)
        if not found and storage.is_file(self._uri):
            file = storage.info(self._uri)
            return [file], {file.path}
        if not found and not storage.exists(self._uri):
            raise SourceError(f"{self._uri}: no such file or folder; set source.uri")
        return found, set()

    def _named(self, uris: list[str], root: str | None) -> tuple[list[FileInfo], set[str]]:
        """The files of these names, and all below those that are folders. Folders are listed, however many names there are."""
        uris = sorted({uri.rstrip("/") for uri in uris})
        folders = sorted({_folder(uri) for uri in uris})
        with ThreadPoolExecutor(LISTERS, thread_name_prefix="raypipe-list") as threads:
            listed = dict(zip(folders, threads.map(storage.entries, folders), strict=True))
            entries = {
                uri: listed[_folder(uri)].get(storage.name(uri), FileInfo("", 0, MISSING))
                for uri in uris
            }
            inside = [uri for uri in uris if entries[uri] is None]
            below = dict(zip(inside, threads.map(storage.listing, inside), strict=True))
        found: dict[str, FileInfo] = {}
        named: set[str] = set()
        for uri, entry in entries.items():
            path = _relative(uri, root)
            for file in below.get(uri, []):
                found[storage.join(path, file.path)] = FileInfo(
                    storage.join(path, file.path), file.size, file.stamp
                )
            if not below.get(uri):
                found[path] = FileInfo(
                    path, entry.size if entry else 0, entry.stamp if entry else MISSING
                )
                named.add(path)
        return sorted(found.values(), key=lambda file: file.path), named

    def stream(self) -> Iterator[FileInfo]:
        """`listing`, of a folder one file after the other as they are found."""
        found = self._walk() if self._is_folder else iter(())
        first = next(found, None)
        if first is None:
            yield from self.listing()
            return
        every = self._include == "*"
        for file in itertools.chain([first], found):
            if every or fnmatch.fnmatchcase(file.path, self._include):
                yield (
                    file
                    if file.path.isascii()
                    else FileInfo(text(file.path), file.size, file.stamp)
                )

    def of_format(self, format: str) -> Iterator[FileInfo]:
        """`files`, of a folder one file after the other as they are found."""
        found = False
        for file in self.stream() if self._is_folder else ():
            if file.path.lower().endswith(EXTENSIONS[format]):
                found = True
                yield file
        if not found:
            yield from self.files(format)

    def folders(self) -> list[str]:
        """Names of the folders directly in `uri`; none where it is a file or a glob. Raises SourceError."""
        try:
            return storage.folders(self._uri) if self._is_folder else []
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

    @property
    def _is_folder(self) -> bool:
        """Whether it can be walked, being neither glob nor pattern nor list."""
        return not (self._is_list or self._is_pattern or self._is_glob)

    @functools.cached_property
    def _is_list(self) -> bool:
        return self._uri.lower().endswith(LIST) and self._is_file

    @functools.cached_property
    def _is_pattern(self) -> bool:
        if patterns.first_brace(self._uri[len(self._literal) :]) < 0:
            return False
        return self._root is None or not storage.exists(self._uri)

    @functools.cached_property
    def _literal(self) -> str:
        """The folder up to which wildcards and braces are parts of names, since there is such a folder; often empty."""
        literal, parts = "", self._uri.split("/")
        bucket = 2 if "://" in self._uri else -1
        for count in range(1, len(parts)):
            if any(special in parts[count - 1] for special in "{*?["):
                folder = "/".join(parts[:count])
                if count - 1 == bucket or not storage.exists(folder):
                    break
                literal = folder
        return literal

    @functools.cached_property
    def _root(self) -> str | None:
        """The part of a brace pattern before its first wildcard or brace, up to a slash; None where that is not even a bucket."""
        rest = self._uri[len(self._literal) :]
        special = min(
            position for position in (_wild(rest), patterns.first_brace(rest)) if position >= 0
        )
        root = _folder(self._literal + rest[:special])
        return None if root.endswith((":", ":/")) else root


def _wild(text: str) -> int:
    """Where the first wildcard is; -1 where there is none."""
    return min((position for position in map(text.find, "*?[") if position >= 0), default=-1)


def _folder(uri: str) -> str:
    """The folder of a file."""
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def _relative(uri: str, root: str | None) -> str:
    """The path below `root`; the whole URI where it is elsewhere."""
    if root == "." and "://" not in uri and not uri.startswith("/"):
        return uri
    prefix = "" if root is None else root.rstrip("/") + "/"
    return uri[len(prefix) :] if prefix and uri.startswith(prefix) else uri


def _listed(uri: str) -> list[str]:
    """The paths and URIs that a list names, a line each; relative ones are below its folder. Lines with # in front are left out."""
    try:
        lines = [line.strip() for line in storage.read_bytes(uri).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri}: a list of files has to be text in UTF-8: {error}") from None
    names = [line for line in lines if line and not line.startswith("#")]
    scheme, separator, folder = _folder(uri).rpartition("://")
    return [
        name
        if "://" in name or name.startswith("/")
        else scheme + separator + posixpath.normpath(f"{folder.rstrip('/')}/{name}")
        for name in names
    ]


def without_content(file: SourceFile) -> str:
    """Why there is nothing to read in a file, as its listing says; "" where there is."""
    if file.stamp == MISSING:
        return "no such file, though it is named"
    return "empty: 0 bytes" if file.size == 0 else ""


class FileSource(Source):
    """A source whose files hold many samples each and are opened one by one."""

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._location = Location(settings)

    def files(self) -> Iterator[SourceFile]:
        for file in self._location.files(self.format):
            yield SourceFile(file.path, file.size, file.stamp)

    def scan(self, file: SourceFile) -> FileScan:
        if reason := without_content(file):
            return self.broken(file, reason)
        try:
            stored = self.open(file.path)
        except FileNotFoundError:
            return self.broken(
                file, "no such file: deleted since it was listed, or its name is not UTF-8"
            )
        with stored:
            return self.scan_stored(file, stored)

    def open(self, path: str) -> Reader:
        """The file of a relative path. Raises FileNotFoundError."""
        return storage.open_read(self._location.uri(path))

    @abc.abstractmethod
    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        """`scan` of a file that is there and is not empty."""


def describe(files: list[FileInfo]) -> str:
    """Such as "12 files (9 .csv, 3 .txt)"."""
    endings = Counter(
        os.path.splitext(file.path)[1].lower() or "without an ending" for file in files
    )
    listed = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(4)) + (
        ", ..." if len(endings) > 4 else ""
    )
    return f"{len(files)} file{'s' * (len(files) != 1)} ({listed})"


def number_or_name(words: str) -> int | str | None:
    """A number where the text is a whole one, also as "3.0", which tables write beside missing values; None for blank text."""
    words = words.strip()
    found = _WHOLE.fullmatch(words)
    return int(found[1]) if found is not None else words or None


def stored_label(value: Any) -> tuple[int | str | None, str]:
    """A label as stored -> (number, name or None, ""), or (None, why it cannot be one).

    Whole numbers stored as floating point are numbers; null, NaN and blank text are missing labels.
    """
    if (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    ):
        return None, ""
    if isinstance(value, str):
        return text(value), ""
    if isinstance(value, int):  # bool is one
        return int(value), ""
    if isinstance(value, float) and value.is_integer():
        return int(value), ""
    shown = repr(value)
    return (
        None,
        f"label is not a number or a name: {shown if len(shown) <= 60 else shown[:60] + '...'}",
    )


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
