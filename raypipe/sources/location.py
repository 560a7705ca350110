"""Where the files of a source are: folders, globs, brace patterns and lists of shards."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources import patterns
from raypipe.sources.formats import EXTENSIONS, HEAD_BYTES, FormatFilter, LeftOut
from raypipe.sources.values import printable
from raypipe.storage import FileInfo
from raypipe.text import error_text

LIST_EXTENSION = ".txt"
"""File name ending of a list of shards."""
MISSING = "missing"
"""Stamp of a file that a pattern or a list names and that does not exist."""
LISTING_THREADS = 16
"""Folders listed at the same time."""


def refuse_web_folder(uri: str) -> None:
    """Raise SourceError for a folder or pattern on the web: servers list files as they please."""
    name = uri.rpartition("/")[2]
    if uri.lower().startswith(("http://", "https://")) and (
        uri.count("/") < 3 or "." not in name or any(char in uri for char in "*?[]{}")
    ):
        raise SourceError(
            f"{uri}: a folder or pattern on the web, which cannot be listed; copy the files to a "
            "disk or a bucket (s3://, gs://, az://), or name a single file, such as .../data.tar"
        )


class Location:
    """The files that `source.uri` and `source.include` stand for.

    The URI is a folder, a single file, a glob, a brace pattern, or a list of shards: a .txt file
    with one name per line. Relative paths are relative to the folder, to the fixed part of a glob
    or pattern (before its first wildcard or brace), or to the folder of the file or list. Files
    that a list names elsewhere keep their whole path or URI. Construction does not touch storage.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self._include = settings.include
        self._uri = settings.uri
        self._filter: FormatFilter | None = None

    def listing(self) -> list[FileInfo]:
        """Return all files that pass `include`, sorted by path.

        A file that a pattern or list names and that does not exist has the stamp `MISSING`.

        Raises
        ------
        SourceError
            If no file can be listed, or none of the named files exists.
        """
        return self._included()[0]

    def files(self, format: str) -> list[FileInfo]:
        """Return the files of a format, sorted by path.

        A file that is given by its own name counts whatever its ending and content.

        Raises
        ------
        SourceError
            If there are none.
        """
        listed, named = self._included()
        self._filter = FormatFilter(format, self.head)
        matching = [file for file in listed if file.path in named or self._filter.accepts(file)]
        if all(file.stamp == MISSING for file in matching):
            raise SourceError(
                f"{self._uri}: no {' or '.join(EXTENSIONS[format])} files among {describe(listed)}"
            )
        return matching

    def uri(self, path: str) -> str:
        """Return the URI of a relative path."""
        if (self._is_list or self._is_pattern) and ("://" in path or path.startswith("/")):
            return path  # only these name files elsewhere; a key of a store can look like it
        if self._is_list:
            return storage.join(_folder(self._uri), path)
        if path == storage.name(self._uri) and self._is_file:
            return self._uri
        if self._is_pattern:
            return storage.join(self._root or "", path)
        root = storage.glob_root(self._uri) if self._is_glob else self._uri
        return f"{root.rstrip('/')}/{path}"  # keys can have empty names: set//x.png

    def stream(self) -> Iterator[FileInfo]:
        """Yield what `listing` returns; a folder's files as soon as storage lists them."""
        walked = self._walk() if self._is_folder else iter(())
        first = next(walked, None)
        if first is None:
            yield from self.listing()
            return
        include_all = self._include == "*"
        for file in itertools.chain([first], walked):
            if include_all or self.includes(file.path):
                if file.path.isascii():
                    yield file
                else:
                    yield FileInfo(printable(file.path), file.size, file.stamp)

    def stream_format(self, format: str) -> Iterator[FileInfo]:
        """Yield what `files` returns; a folder's files as soon as storage lists them."""
        empty = True
        self._filter = FormatFilter(format, self.head)
        for file in self.stream() if self._is_folder else ():
            if self._filter.accepts(file):
                empty = False
                yield file
        if empty:
            yield from self.files(format)

    def includes(self, path: str) -> bool:
        """Return whether a relative path passes `include`."""
        return fnmatch.fnmatchcase(path, self._include)

    @property
    def names_files(self) -> bool:
        """Whether the URI names its files one by one: a list, or a pattern with braces."""
        return self._is_list or self._is_pattern

    @property
    def chooses_files(self) -> bool:
        """Whether the URI names files, one by one or by a glob pattern, and not their folder."""
        return self.names_files or self._is_glob

    @property
    def left_out(self) -> dict[str, LeftOut]:
        """Files that the last listing of a format left out, by ending."""
        return self._filter.left_out if self._filter is not None else {}

    def head(self, file: FileInfo) -> bytes:
        """Return the first bytes of a file; b"" if it does not exist or cannot be read."""
        try:
            return storage.read_bytes(self.uri(file.path), 0, HEAD_BYTES)
        except (FileNotFoundError, IsADirectoryError):
            return b""
        except PermissionError:
            if not storage.is_local(self._uri):
                raise  # expired credentials would leave out everything
            return b""

    def folders(self, below: str = "") -> list[str]:
        """Return the names of the folders directly in `uri`, or in a folder of it.

        There are none for a file or glob.

        Raises
        ------
        SourceError
            If the folder cannot be listed.
        """
        try:
            uri = storage.join(self._uri, below) if below else self._uri
            return storage.folders(uri) if self._is_folder else []
        except (OSError, ValueError) as error:
            raise self._cannot_list(error) from None

    def _included(self) -> tuple[list[FileInfo], set[str]]:
        """Return the files that pass `include`, and the paths of those given by their own names."""
        try:
            listed, named = self._all()
        except (OSError, ValueError) as error:
            raise self._cannot_list(error) from None
        included = [file for file in listed if self.includes(file.path)]
        if not included:
            reason = (
                f"none of {len(listed)} files matches source.include = {self._include!r}, "
                f"such as {printable(listed[0].path)}; correct it"
                if listed
                else "no files here"
            )
            raise SourceError(f"{self._uri}: {reason}")
        if all(file.stamp == MISSING for file in included):
            raise SourceError(
                f"{self._uri}: none of the {len(included)} files it names exists, such as "
                f"{printable(included[0].path)}; correct the names"
            )
        files = [FileInfo(printable(file.path), file.size, file.stamp) for file in included]
        return files, {printable(path) for path in named}

    def _all(self) -> tuple[list[FileInfo], set[str]]:
        """As `_included`, before `include` is applied."""
        if self._is_list:
            return _named_files(_read_shard_list(self._uri), _folder(self._uri))
        if self._is_pattern:
            return self._pattern_files()
        if self._is_glob:
            return storage.matching(self._uri), set()
        files = storage.listing(self._uri)
        if not files and storage.is_file(self._uri):
            file = storage.info(self._uri)
            return [file], {file.path}
        if not files and not storage.exists(self._uri):
            raise SourceError(f"{self._uri}: no such file or folder; check source.uri")
        return files, set()

    def _pattern_files(self) -> tuple[list[FileInfo], set[str]]:
        """Return the files of a brace pattern, whose names can contain wildcards as well."""
        start = len(self._literal)
        names = [self._literal + rest for rest in patterns.expand(self._uri[start:])]
        globs = {name for name in names if _first_wildcard(name[start:]) >= 0}
        files, named = _named_files([name for name in names if name not in globs], self._root)
        with ThreadPoolExecutor(LISTING_THREADS, thread_name_prefix="raypipe-list") as threads:
            for glob, matches in zip(globs, threads.map(storage.matching, globs), strict=True):
                folder = storage.glob_root(glob)
                for file in matches:
                    path = _relative(storage.join(folder, file.path), self._root)
                    files.append(FileInfo(path, file.size, file.stamp))
        unique = {file.path: file for file in files}
        return sorted(unique.values(), key=lambda file: file.path), named

    def _walk(self) -> Iterator[FileInfo]:
        try:
            yield from storage.walk(self._uri)
        except (OSError, ValueError) as error:
            raise self._cannot_list(error) from None

    def _cannot_list(self, error: Exception) -> SourceError:
        return SourceError(f"{self._uri}: cannot be listed: {error_text(error)}")

    @functools.cached_property
    def _is_glob(self) -> bool:
        return storage.glob_root(self._uri) != self._uri and not storage.exists(self._uri)

    @functools.cached_property
    def _is_file(self) -> bool:
        return storage.is_file(self._uri)

    @property
    def _is_folder(self) -> bool:
        """Whether it can be walked: neither glob nor pattern nor list."""
        return not (self._is_list or self._is_pattern or self._is_glob)

    @functools.cached_property
    def _is_list(self) -> bool:
        return self._uri.lower().endswith(LIST_EXTENSION) and self._is_file

    @functools.cached_property
    def _is_pattern(self) -> bool:
        if patterns.first_brace(self._uri[len(self._literal) :]) < 0:
            return False
        return self._root is None or not storage.exists(self._uri)

    @functools.cached_property
    def _literal(self) -> str:
        """The longest leading folder that exists although its name has wildcards or braces.

        Up to there these characters are taken literally. Often empty.
        """
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
        """The folder of a brace pattern before its first wildcard or brace.

        None if that part does not even name a bucket.
        """
        rest = self._uri[len(self._literal) :]
        positions = (_first_wildcard(rest), patterns.first_brace(rest))
        special = min(position for position in positions if position >= 0)
        root = _folder(self._literal + rest[:special])
        return None if root.endswith((":", ":/")) else root


def _named_files(uris: list[str], root: str | None) -> tuple[list[FileInfo], set[str]]:
    """Return the files with these names, and all files below those that are folders.

    One listing per parent folder, however many names there are. The second result has the paths
    of the files given by their own names.
    """
    uris = sorted({uri.rstrip("/") for uri in uris})
    folders = sorted({_folder(uri) for uri in uris})
    with ThreadPoolExecutor(LISTING_THREADS, thread_name_prefix="raypipe-list") as threads:
        listed = dict(zip(folders, threads.map(storage.entries, folders), strict=True))
        entries = {
            uri: listed[_folder(uri)].get(storage.name(uri), FileInfo("", 0, MISSING))
            for uri in uris
        }
        subfolders = [uri for uri in uris if entries[uri] is None]
        below = dict(zip(subfolders, threads.map(storage.listing, subfolders), strict=True))
    files: dict[str, FileInfo] = {}
    named: set[str] = set()
    for uri, entry in entries.items():
        path = _relative(uri, root)
        for file in below.get(uri, []):
            inner = storage.join(path, file.path)
            files[inner] = FileInfo(inner, file.size, file.stamp)
        if not below.get(uri):
            size, stamp = (entry.size, entry.stamp) if entry else (0, MISSING)
            files[path] = FileInfo(path, size, stamp)
            named.add(path)
    return sorted(files.values(), key=lambda file: file.path), named


def _read_shard_list(uri: str) -> list[str]:
    """Return the paths and URIs in a list, one per line. Lines that start with # are skipped.

    Relative names are resolved against the list's folder.
    """
    try:
        lines = [line.strip() for line in storage.read_bytes(uri).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{uri}: a list of files has to be text in UTF-8 ({error}); convert it and rerun"
        ) from None
    names = [line for line in lines if line and not line.startswith("#")]
    scheme, separator, folder = _folder(uri).rpartition("://")
    return [
        name
        if "://" in name or name.startswith("/")
        else scheme + separator + posixpath.normpath(f"{folder.rstrip('/')}/{name}")
        for name in names
    ]


def _first_wildcard(text: str) -> int:
    """Position of the first wildcard; -1 if there is none."""
    return min((position for position in map(text.find, "*?[") if position >= 0), default=-1)


def _folder(uri: str) -> str:
    """Return the folder of a file."""
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def _relative(uri: str, root: str | None) -> str:
    """Return the path below `root`, or the whole URI if it is elsewhere."""
    if root == "." and "://" not in uri and not uri.startswith("/"):
        return uri
    prefix = "" if root is None else root.rstrip("/") + "/"
    return uri[len(prefix) :] if prefix and uri.startswith(prefix) else uri


def describe(files: list[FileInfo]) -> str:
    """Return a summary such as "12 files (9 .csv, 3 .txt)"."""
    endings = Counter(
        os.path.splitext(file.path)[1].lower() or "without an ending" for file in files
    )
    listed = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(4)) + (
        ", ..." if len(endings) > 4 else ""
    )
    return f"{len(files)} file{'s' * (len(files) != 1)} ({listed})"
