"""File lists: a CSV, TSV or plain text file with a path and, optionally, a label per line (`raypipe.sources.lines` says how it is read).

Sample ids are the paths as listed, without a leading slash, below `source.root`. What a line says of its image, its label or why it
cannot be read, is in the unit it falls into, so that a worker reads neither the list nor the class map.

A list cannot name anything outside the root: `..` is a reject, and so is a path or URI that begins with another place than the root.
The list is read once, from front to back; of its paths only hashes of 8 bytes are held, to find those that it names twice.
"""

from __future__ import annotations

import fnmatch
import functools
import heapq
import posixpath
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import FileScan, Fragment, IdFilter, RawSample, Source, SourceFile
from raypipe.sources.classfile import ClassFile, read_class_file
from raypipe.sources.common import number_or_name, text
from raypipe.sources.lines import Line, lines
from raypipe.sources.places import class_file, find_list, root_of
from raypipe.sources.smallfiles import Member, path_hash, read_ahead, units, unpacked

BLOCK = 16_384
"""Lines that are looked for together among those before them."""
PROBES = 32
"""Listed files, drawn by a hash, of which one at least has to be there."""


class FileListSource(Source):
    """Files of one image each, named by a list."""

    format = "filelist"
    scan_reads = "nothing"
    reads_singly = True

    def settled(self, image_size: int = 0) -> SourceSettings:
        """With the list itself as `uri`, and with `root` and `class_map`."""
        settings, uri = super().settled(), find_list(self.settings.uri)
        root = settings.root if settings.root is not None else root_of(uri, image_size)
        return settings.model_copy(
            update={"uri": uri, "root": root, "class_map": settings.class_map or class_file(uri)}
        )

    def files(self) -> Iterator[SourceFile]:
        """Runs of neighbouring lines, see `units`; no listed file is asked for but a few, in the end."""
        salt = self._classes.digest if self._classes is not None else ""
        yield from units(
            ((member, len(member.packed()), "") for member in self._members()),
            self.settings.fragment_samples,
            salt,
        )

    def scan(self, file: SourceFile) -> FileScan:
        labels = (unpacked(member).label for member in file.members)
        names = self._classes.names if self._classes is not None else None
        return FileScan(
            self.cut(file, len(file.members)),
            names,
            frozenset(label for label in labels if label is not None),
        )

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        return Counter(unpacked(member).label for member in file.members)

    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        root, members = self._root, map(unpacked, fragment.members[fragment.start : fragment.stop])
        chosen = (
            (member, storage.join(root, member.path))
            for member in members
            if wanted is None or wanted(member.path)
        )
        return read_ahead(chosen, f"no such file below {root}")

    @functools.cached_property
    def _found(self) -> SourceSettings:
        return self.settled()

    @functools.cached_property
    def _root(self) -> str:
        root = self.settings.root if self.settings.root is not None else self._found.root
        return (root or "").rstrip("/") or "/"

    @functools.cached_property
    def _local_root(self) -> str | None:
        return (
            storage.filesystem(self._root)[1].rstrip("/") if storage.is_local(self._root) else None
        )

    @functools.cached_property
    def _list(self) -> str:
        return self._found.uri

    @functools.cached_property
    def _classes(self) -> ClassFile | None:
        if self._found.class_map is None or self.settings.label_column is None:
            return None
        return read_class_file(self._found.class_map)

    def _members(self) -> Iterator[Member]:
        """A member for each line that `include` lets through. Raises SourceError where none can be used."""
        seen, again = _Seen(), dict[int, int]()
        probes: list[tuple[int, str]] = []  # the lowest hashes, negated
        count, bad = 0, ""
        for block in self._blocks():
            hashes = [path_hash(self._place(member.path)) for member in block]
            repeated = seen.add(hashes)
            for member, key, twice in zip(block, hashes, repeated.tolist()):
                count += 1
                if twice:
                    again[key] = again.get(key, 1) + 1  # which time it is tells equal lines apart
                    reason = member.reason or "duplicate: the list names it before"
                    member = member._replace(reason=f"{reason} (time {again[key]})")
                elif member.reason:
                    bad = bad or f"{member.path}: {member.reason}"
                elif len(probes) < PROBES:
                    heapq.heappush(probes, (-key, member.path))
                elif -key > probes[0][0]:
                    heapq.heapreplace(probes, (-key, member.path))
                yield member
        if not count:
            which = (
                "no line"
                if self.settings.include == "*"
                else f"no path that matches source.include = {self.settings.include!r}"
            )
            raise SourceError(f"{self._list}: {which}")
        if not probes:
            raise SourceError(
                f"{self._list}: none of {count} lines can be used ({bad}); check the list, or set source.root"
            )
        self._check([path for _, path in probes])

    def _check(self, paths: list[str]) -> None:
        """That the root is not quite another one."""
        root = self._root
        with ThreadPoolExecutor(8, thread_name_prefix="raypipe-list") as pool:
            there = pool.map(lambda path: _there(storage.join(root, path)), paths)
            if not any(there):
                some = f"none of {len(paths)} drawn at random" if len(paths) > 1 else "not"
                raise SourceError(
                    f"{self._list}: of the listed files {some} is below {root} (such as {paths[0]}); set source.root"
                )

    def _blocks(self) -> Iterator[list[Member]]:
        block: list[Member] = []
        try:
            for line in lines(self._list, self.settings):
                member = self._member(line)
                if self.settings.include == "*" or fnmatch.fnmatchcase(
                    member.path, self.settings.include
                ):
                    block.append(member)
                if len(block) == BLOCK:
                    yield block
                    block = []
        except (FileNotFoundError, IsADirectoryError):
            raise SourceError(f"{self._list}: no such file; set source.uri") from None
        yield block

    def _member(self, line: Line) -> Member:
        path, reason = self._below_root(line.path)
        if "\0" in line.path or "\0" in (line.label or ""):
            return Member(
                f"{storage.name(self._list)}#line-{line.number}", None, "the line holds a zero byte"
            )
        if not path:
            return Member(
                f"{storage.name(self._list)}#line-{line.number}",
                None,
                reason or "the line has no path",
            )
        words = line.label if self.settings.label_column is not None else None
        label = number_or_name(text(words)) if words is not None else None
        if isinstance(label, str) and self._classes is not None:
            label = self._classes.index.get(label.strip("/"), label)
        return Member(text(path), label, reason)

    def _below_root(self, path: str) -> tuple[str, str]:
        """The path below the root, and why it must not be read."""
        kind, is_uri, rest = path.partition("://")
        if (
            is_uri
            and kind in {"file", "local"}
            and self._local_root is not None
            and rest.startswith(self._local_root + "/")
        ):
            path = rest[len(self._local_root) :]
        elif is_uri and self._local_root is None and path.startswith(self._root + "/"):
            path = path[len(self._root) :]
        elif is_uri:
            return path, f"outside of {self._root}; see source.root"
        elif self._local_root is not None and path.startswith(self._local_root + "/"):
            path = path[len(self._local_root) :]
        path = path.lstrip("/")
        while path.startswith("./"):
            path = path[2:].lstrip("/")
        if ".." in path.split("/"):
            return path, "a path with '..', which is not followed"
        return path, ""

    def _place(self, path: str) -> str:
        """The same for every way to write a path; the keys of an object store are what they are."""
        return (
            posixpath.normpath(path)
            if self._local_root is not None and ("//" in path or "/." in path)
            else path
        )


class _Seen:
    """A growing set of 64-bit hashes in sorted arrays, 8 bytes each. Of 30 million lists of a million paths, one has two equal by chance."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: list[int]) -> np.ndarray:
        """Which of them were there before, or are earlier in the list; bool [n]."""
        new = np.array(hashes, np.uint64)
        distinct, first = np.unique(new, return_index=True)
        known = np.zeros(len(distinct), bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            known |= run[place] == distinct
        repeated = np.ones(len(new), bool)
        repeated[first[~known]] = False
        if not known.all():
            self._runs.append(distinct[~known])
        # runs of equal length are merged, so that there are few of them
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return repeated


def _there(uri: str) -> bool:
    try:
        return storage.exists(uri)
    except PermissionError:
        return True  # something is
