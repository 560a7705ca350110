"""`FileSource`, the base class of formats whose files hold many samples each."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import Source
from raypipe.sources.formats import LeftOut, copied_name, uncompressed_name
from raypipe.sources.location import MISSING, Location
from raypipe.sources.splits import several_splits
from raypipe.sources.types import FileScan, SourceFile
from raypipe.sources.values import printable
from raypipe.storage import FileInfo, Reader
from raypipe.text import stand_in

MAX_STAND_IN_BYTES = 64 << 10
"""A larger file is what it is called, and is not read from its start to find out."""
FILE_VANISHED = "no such file: deleted since it was listed, or its name is not UTF-8"
"""Reject reason of a listed file that cannot be opened."""


class FileSource(Source):
    """A source whose files hold many samples each and are opened one by one.

    `files` and `scan` are implemented here. A subclass defines

    `format`
        A key of `raypipe.sources.formats.EXTENSIONS`, which lists the format's file name endings.
        (A subclass that overrides `files` does not need it there.)
    `scan_stored`
        `scan`, given the open file. Missing and empty files never reach it.
    `read`
        As in `Source`. Open the file with `self.open(fragment.path)`, and turn exceptions of the
        format's library into reject reasons with `raypipe.sources.values.damage_reason`, which
        raises storage faults again.
    """

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._location = Location(settings)

    @property
    def left_out(self) -> dict[str, LeftOut]:
        return self._location.left_out

    def files(self) -> Iterator[SourceFile]:
        files = self.listed()
        self._refuse_copies(files)
        splits = several_splits([file.path for file in files])
        if splits is not None and not self._location.names_files:
            pattern = repr(splits.include) if splits.include else "the files of one"
            raise SourceError(
                f"{self.settings.uri}: the files are of several splits: {splits.counts}; set "
                f"source.include to {pattern}, or name all of them in source.uri with braces, such "
                "as {train,test}-*, to read them as one"
            )
        for file in files:
            yield SourceFile(file.path, file.size, file.stamp)

    def _refuse_copies(self, files: Sequence[FileInfo]) -> None:
        """Raise SourceError if a file is there twice: plain and compressed, or as a copy."""
        if self._location.names_files:
            return
        sizes = {file.path: file.size for file in files}
        for path, size in sizes.items():
            plain, original = uncompressed_name(path), copied_name(path)
            if plain != path and plain in sizes:
                raise SourceError(
                    f"{self.settings.uri}: {printable(path)} and {printable(plain)} would be read "
                    "as different samples, but the first seems to be the second, compressed; "
                    "remove one of the two kinds, or choose one with source.include"
                )
            if original != path and sizes.get(original) == size:
                raise SourceError(
                    f"{self.settings.uri}: {printable(path)} and {printable(original)} would be "
                    "read as different samples, but have the same size, and the first is named "
                    "like a copy; remove it, or rename it if it is not one"
                )

    def listed(self) -> list[FileInfo]:
        """Return the files of this format, sorted by path. Raises SourceError."""
        return self._location.files(self.format)

    def scan(self, file: SourceFile) -> FileScan:
        if reason := no_content(file):
            return self.unreadable_file(file, reason)
        try:
            stored = self.open(file.path)
        except FileNotFoundError:
            return self.unreadable_file(file, FILE_VANISHED)
        with stored:
            if reason := other_content(file, stored):
                return self.unreadable_file(file, reason)
            return self.scan_stored(file, stored)

    def checked_split(self, split: str) -> str:
        """Return the split of a file's samples for `FileScan`.

        It is "" if `source.uri` names the files: then they are read as one, whatever they hold.
        """
        return "" if self._location.names_files else split

    def open(self, path: str) -> Reader:
        """Open the file at a relative path. Raises FileNotFoundError."""
        return storage.open_read(self._location.uri(path))

    @abc.abstractmethod
    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        """Scan a file that exists and is not empty; see `Source.scan`."""


def other_content(file: SourceFile, stored: Reader) -> str:
    """Return what is stored in place of a file, such as a Git LFS pointer; "" for anything else."""
    if file.size > MAX_STAND_IN_BYTES:
        return ""
    reason = stand_in(stored.read(64))
    stored.seek(0)
    return reason


def no_content(file: SourceFile) -> str:
    """Return why the listing says that a file has no content; "" if it has some."""
    if file.stamp == MISSING:
        return "no such file, although source.uri names it"
    return "empty: 0 bytes" if file.size == 0 else ""
