"""File lists: a CSV, TSV or plain text file with one path and, optionally, a label per line.

`raypipe.sources.lines` describes how a list is parsed.

Sample ids are the paths as listed, relative to `source.root` and without a leading slash. The label
of an image, and the reason if its line cannot be used, are stored in the unit that the line falls
into, so that workers read neither the list nor the class map.

A list cannot name anything outside the root: a path with `..`, or a path or URI that begins with
another folder than the root, is a reject. The list is read once, from front to back. To find paths
that it names twice, only a hash of 8 bytes per path is held.
"""

from __future__ import annotations

import fnmatch
import functools
import heapq
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.base import Source
from raypipe.sources.classfile import ClassFile, read_class_file
from raypipe.sources.lines import Line, read_lines
from raypipe.sources.places365 import class_names_file, find_list, image_root
from raypipe.sources.smallfiles import Member, file_runs, path_hash, read_members, unpack_member
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile
from raypipe.sources.values import number_or_name, printable

BLOCK_LINES = 16_384
"""Lines that are checked for repeated paths together."""
PROBES = 32
"""Listed files, drawn by a hash, of which at least one has to exist."""


class FileListSource(Source):
    """Files of one image each, named by a list."""

    format = "filelist"
    scan_reads = "nothing"
    random_access = True

    def resolved_settings(self, image_size: int = 0) -> SourceSettings:
        """Return the settings with the list itself as `uri`, and with `root` and `class_map`."""
        settings, uri = super().resolved_settings(), find_list(self.settings.uri)
        root = settings.root if settings.root is not None else image_root(uri, image_size)
        class_map = settings.class_map or class_names_file(uri)
        return settings.model_copy(update={"uri": uri, "root": root, "class_map": class_map})

    def files(self) -> Iterator[SourceFile]:
        """Yield runs of neighbouring lines (see `file_runs`).

        Listed files are not opened. After the last run, a few are checked for existence.
        """
        salt = self._classes.digest if self._classes is not None else ""
        yield from file_runs(
            ((member, len(member.packed()), "") for member in self._members()),
            self.settings.fragment_samples,
            self.cuts,
            salt,
        )

    def scan(self, file: SourceFile) -> FileScan:
        labels = (unpack_member(member).label for member in file.members)
        names = self._classes.names if self._classes is not None else None
        return FileScan(
            self.cut_fragments(file, len(file.members)),
            names,
            frozenset(label for label in labels if label is not None),
        )

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        return Counter(unpack_member(member).label for member in file.members)

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        root = self._root
        members = map(unpack_member, fragment.members[fragment.start : fragment.stop])
        chosen = (
            (member, storage.join(root, member.path))
            for member in members
            if keep_id is None or keep_id(member.path)
        )
        return read_members(chosen, f"no such file below {root}")

    @functools.cached_property
    def _resolved(self) -> SourceSettings:
        return self.resolved_settings()

    @functools.cached_property
    def _root(self) -> str:
        root = self.settings.root if self.settings.root is not None else self._resolved.root
        return (root or "").rstrip("/") or "/"

    @functools.cached_property
    def _local_root(self) -> str | None:
        """The root as a local path; None if it is on an object store."""
        if not storage.is_local(self._root):
            return None
        return storage.filesystem(self._root)[1].rstrip("/")

    @functools.cached_property
    def _list(self) -> str:
        return self._resolved.uri

    @functools.cached_property
    def _classes(self) -> ClassFile | None:
        if self._resolved.class_map is None or self.settings.label_column is None:
            return None
        return read_class_file(self._resolved.class_map)

    def _members(self) -> Iterator[Member]:
        """One member per line that passes `include`. Raises SourceError if none can be used."""
        seen, occurrences = _HashSet(), dict[int, int]()
        probes = _LowestHashes(PROBES)
        count, first_problem = 0, ""
        for block in self._blocks():
            hashes = [path_hash(self._normalised(member.path)) for member in block]
            repeated = seen.add(hashes)
            for member, key, is_repeated in zip(block, hashes, repeated.tolist()):
                count += 1
                if is_repeated:
                    # the number makes the entries of equal lines differ
                    occurrences[key] = occurrences.get(key, 1) + 1
                    reason = (
                        member.reason or "duplicate: an earlier line names it, and its label counts"
                    )
                    yield member._replace(reason=f"{reason} (occurrence {occurrences[key]})")
                    continue
                if member.reason:
                    first_problem = first_problem or f"{member.path}: {member.reason}"
                else:
                    probes.add(key, member.path)
                yield member
        if not count:
            problem = (
                "no line; the list needs one for each sample"
                if self.settings.include == "*"
                else f"no path that matches source.include = {self.settings.include!r}; correct it"
            )
            raise SourceError(f"{self._list}: {problem}")
        if not probes.paths:
            raise SourceError(
                f"{self._list}: none of {count} lines can be used ({first_problem}); "
                "check the list, or set source.root"
            )
        self._check_root(probes.paths, count)

    def _check_root(self, paths: list[str], count: int) -> None:
        """Raise SourceError if none of some files, of `count` listed, exists: the root is wrong."""
        root = self._root
        with ThreadPoolExecutor(8, thread_name_prefix="raypipe-list") as pool:
            exist = pool.map(lambda path: _exists(storage.join(root, path)), paths)
            if not any(exist):
                drawn = " drawn at random" if count > len(paths) else ""
                absent = (
                    f"none of {len(paths)} listed files{drawn} is"
                    if len(paths) > 1
                    else "the listed file is not"
                )
                raise SourceError(
                    f"{self._list}: {absent} below {root} (such as {paths[0]}); "
                    f"{_advice(root, paths)}"
                )

    def _blocks(self) -> Iterator[list[Member]]:
        """Yield the members that pass `include`, `BLOCK_LINES` at a time."""
        include = self.settings.include
        block: list[Member] = []
        spellings = dict[int, str]()
        try:
            for line in read_lines(self._list, self.settings):
                member = self._member(line)
                if (
                    isinstance(member.label, int)
                    and number_or_name(line.label or "") == member.label
                ):
                    self._check_spelling(line, member.label, spellings)
                if include == "*" or fnmatch.fnmatchcase(member.path, include):
                    block.append(member)
                if len(block) == BLOCK_LINES:
                    yield block
                    block = []
        except (FileNotFoundError, IsADirectoryError):
            raise SourceError(f"{self._list}: no such file; check source.uri") from None
        yield block

    def _check_spelling(self, line: Line, label: int, spellings: dict[int, str]) -> None:
        """Raise SourceError for a number that earlier lines spell differently, such as 1 and 01.

        They can be names of two classes. `1.0` is not another spelling: pandas writes it for 1.
        """
        spelling = (line.label or "").strip().partition(".")[0]
        first = spellings.setdefault(label, spelling)
        if spelling != first:
            raise SourceError(
                f"{self._list}: line {line.number}: label {spelling!r} is the same number as "
                f"{first!r} above; write all labels of a class alike, or, if these are two "
                "classes, put a letter before the names of all classes"
            )

    def _member(self, line: Line) -> Member:
        path, reason = self._below_root(line.path)
        line_id = f"{storage.name(self._list)}#line-{line.number}"
        if "\0" in line.path or "\0" in (line.label or ""):
            return Member(line_id, None, "the line holds a zero byte")
        if not path:
            return Member(line_id, None, reason or "the line has no path")
        stored = line.label if self.settings.label_column is not None else None
        label = number_or_name(printable(stored)) if stored is not None else None
        if isinstance(label, str) and self._classes is not None:
            label = self._classes.index.get(label.strip("/"), label)
        return Member(printable(path), label, reason)

    def _below_root(self, path: str) -> tuple[str, str]:
        """Return the path relative to the root, and why it must not be read."""
        scheme, is_uri, rest = path.partition("://")
        local_root = self._local_root
        if (
            is_uri
            and scheme in {"file", "local"}
            and local_root is not None
            and rest.startswith(local_root + "/")
        ):
            path = rest[len(local_root) :]
        elif is_uri and local_root is None and path.startswith(self._root + "/"):
            path = path[len(self._root) :]
        elif is_uri and scheme in {"http", "https"}:
            return path, "an address on the web, which is not read; download the images"
        elif is_uri:
            return path, f"outside {self._root}; see source.root"
        elif local_root is not None and path.startswith(local_root + "/"):
            path = path[len(local_root) :]
        path = path.lstrip("/")
        while path.startswith("./"):
            path = path[2:].lstrip("/")
        if ".." in path.split("/"):
            return path, "a path with '..', which is not followed"
        return path, ""

    def _normalised(self, path: str) -> str:
        """Return the canonical spelling of a local path. Keys of an object store are unchanged."""
        if self._local_root is not None and ("//" in path or "/." in path):
            return posixpath.normpath(path)
        return path


def _advice(root: str, paths: list[str]) -> str:
    """Return what to do when none of the listed files exists below the root."""
    for form in ("NFC", "NFD"):
        if any(_exists(storage.join(root, _other_form(path, form))) for path in paths):
            return (
                f"they exist with accents in the Unicode form {form}: write the list from the "
                "names in the folder"
            )
    slashed = [path.replace("\\", "/") for path in paths if "\\" in path]
    if any(_exists(storage.join(root, path)) or _endings(root, path) for path in slashed):
        return "they exist with slashes (/) instead of backslashes: replace these in the list"
    for path in paths:
        if endings := _endings(root, path):
            return f"{path}{endings[0]} exists: add the endings of the files to the list"
    return "set source.root"


def _other_form(path: str, form: Literal["NFC", "NFD"]) -> str:
    """Return a path in a Unicode form; "?", which no file is called, if it is in this one."""
    normal = unicodedata.normalize(form, path)
    return normal if normal != path else "?"


def _endings(root: str, path: str) -> list[str]:
    """Return the endings of files that differ from a path by an ending alone."""
    folder, _, name = path.rpartition("/")
    try:
        names = storage.entries(storage.join(root, folder) if folder else root)
    except (OSError, ValueError):
        return []
    return sorted(entry[len(name) :] for entry in names if entry.startswith(f"{name}."))


class _LowestHashes:
    """The paths with the `count` lowest hashes: a sample that does not depend on their order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[int, str]] = []  # hashes negated: the highest is on top

    def add(self, key: int, path: str) -> None:
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, (-key, path))
        elif -key > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-key, path))

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self._heap]


class _HashSet:
    """A growing set of 64-bit hashes in sorted arrays, 8 bytes each.

    In one of 30 million lists of a million paths, two paths have equal hashes by chance.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: list[int]) -> np.ndarray:
        """Add hashes, and return which ones the set or an earlier position had: bool [n]."""
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
        # merge runs of similar length, so that few remain
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return repeated


def _exists(uri: str) -> bool:
    try:
        return storage.exists(uri)
    except PermissionError:
        return True  # something exists there
