"""Data types that every source uses: files, fragments and samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

IdFilter = Callable[[str], bool]
"""A function `sample_id -> bool`: whether to read the sample."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, or a bounded run of small files, as a listing shows it.

    Attributes
    ----------
    path : str
        Relative to the source's root. For a run of small files, the path of its first file.
    size : int
        Bytes. For a file list, which does not state the sizes of its images, the bytes of the
        list's own entries.
    stamp : str
        ETag or modification time. Together with path and size it is the file's fingerprint.
    members : tuple of str
        For a run of small files, one entry per file: its relative path and whatever else the
        source records about it. Empty otherwise.
    """

    path: str
    size: int
    stamp: str
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fragment:
    """The unit of work: samples `start` to `stop` (exclusive) of one source file.

    Attributes
    ----------
    fragment_id : str
        Names every output file of the fragment. It changes when the file's content changes.
    path : str
        Path of the source file.
    start, stop : int
        Range of samples within the file.
    offset : int
        Byte at which reading can begin (uncompressed tar, Arrow stream), else 0. -1: a tar that is
        read as a whole (`raypipe.sources.webdataset.SCATTERED`).
    members : tuple of str
        Those of the `SourceFile` if it is a run of small files. Fragments that were read from an
        index have none until `Run.with_members` adds them.
    error : str
        Why the file cannot be read at all. Such a fragment has no samples.
    index_file : str
        Index file of the run that lists the members.
    """

    fragment_id: str
    path: str
    start: int
    stop: int
    offset: int = 0
    members: tuple[str, ...] = ()
    error: str = ""
    index_file: str = ""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.stop - self.start


@dataclass(frozen=True)
class FileScan:
    """Result of scanning one file.

    Attributes
    ----------
    fragments : tuple of Fragment
        All samples of the file, in order.
    class_names : tuple of str or None
        Names of the classes, if the file states them.
    labels : frozenset of int or str
        The distinct stored labels. Can stay empty if `class_names` is set.
    split : str
        The split that the rows name (`raypipe.sources.splits`); "" if they name none. All files of
        a source have to agree.
    padded : frozenset of str
        All spellings of the numbers that some label spells unusually, such as "01". All files of a
        source have to spell a number alike (`raypipe.sources.classes.LabelSpellings`).
    """

    fragments: tuple[Fragment, ...]
    class_names: tuple[str, ...] | None = None
    labels: frozenset[int | str] = field(default_factory=frozenset)
    split: str = ""
    padded: frozenset[str] = frozenset()


class RawSample(NamedTuple):
    """One sample as stored.

    Attributes
    ----------
    sample_id : str
        Unique within the source.
    image : bytes, ndarray or None
        Encoded bytes, or uint8 [height, width] or [height, width, 3]. None if it is unreadable.
        Other arrays need `source.transform`, or `proxy.channels`.
    label : int, str or None
        As stored: a class number, a class name, or None if the sample has no label.
    reason : str
        Why the image is unreadable, for people; "" if it is readable.
    """

    sample_id: str
    image: bytes | np.ndarray | None
    label: int | str | None
    reason: str = ""


@dataclass(frozen=True)
class Preview:
    """A cheap look into one file, as `raypipe inspect` combines them.

    Attributes
    ----------
    drawn : tuple of RawSample
        Samples from random places of the file.
    samples : float
        Number of samples in the file.
    counted : bool
        Whether `samples` was counted rather than estimated from the part that was read.
    labels : Counter
        Stored label (None: no label) -> number of samples, over all labels that were read.
    class_names : tuple of str or None
        Names of the classes, if the file states them.
    error : str
        Why the file cannot be read at all.
    split, padded : str, frozenset of str
        As in `FileScan`.
    """

    drawn: tuple[RawSample, ...] = ()
    samples: float = 0
    counted: bool = True
    labels: Counter[int | str | None] = field(default_factory=Counter)
    class_names: tuple[str, ...] | None = None
    error: str = ""
    split: str = ""
    padded: frozenset[str] = frozenset()
