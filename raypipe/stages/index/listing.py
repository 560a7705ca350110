"""The listing of a source: ids of its files, and a listing that can be read twice."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator

from raypipe.sources import SourceFile


def file_id(file: SourceFile) -> str:
    """Return a hash of a file's path, size, stamp and members."""
    digest = hashlib.blake2b(digest_size=12)
    for item in (file.path, str(file.size), file.stamp, *file.members):
        digest.update(item.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


class OrderedDigest:
    """A short hash of names in their order."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._digest = hashlib.blake2b(digest_size=8)
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        self._digest.update(name.encode() + b"\0")

    def text(self) -> str:
        return self._digest.hexdigest()


class RecordedListing:
    """A listing that can be iterated again without listing the storage again.

    The files seen so far are in a temporary file.
    """

    def __init__(self, files: Iterator[SourceFile]) -> None:
        self._files = files
        self._seen = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as this object)

    def __iter__(self) -> Iterator[SourceFile]:
        self._seen.seek(0)
        for line in self._seen:
            path, size, stamp, members = json.loads(line)
            yield SourceFile(path, size, stamp, tuple(members))
        self._seen.seek(0, os.SEEK_END)
        for file in self._files:
            self._seen.write(json.dumps([file.path, file.size, file.stamp, file.members]) + "\n")
            yield file
