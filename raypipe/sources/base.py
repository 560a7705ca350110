"""What every source gives: files, what is in a file, and the samples of one fragment.

A source is made anew in every worker from the settings alone; it holds no open files.
"""

from __future__ import annotations

import abc
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.noise import LabelNoise


@dataclass(frozen=True)
class SourceFile:
    """One file of the source, or a bounded run of small files (`members`), as a listing shows it.

    path     relative to the source's root; of a run of small files, the name of its first
    size     bytes; of a file list, which does not say, those of its own words
    stamp    ETag or time of change: with path and size, the fingerprint
    members  where the unit is a run of small files: of each its relative path, and what else the source has to say of it
    """

    path: str
    size: int
    stamp: str
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fragment:
    """The unit of work: samples `start` to `stop` (exclusive) of one source file.

    fragment_id  names every output file made from it; changes when the file's content does
    offset       byte at which reading may begin (uncompressed tar), else 0
    members      as of the SourceFile, where it is a run of small files; listed in the index (`Run.with_members`)
    error        why the file cannot be read at all; such a fragment has no samples
    part         index file that lists the members
    """

    fragment_id: str
    path: str
    start: int
    stop: int
    offset: int = 0
    members: tuple[str, ...] = ()
    error: str = ""
    part: str = ""

    @property
    def samples(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class FileScan:
    """What is in one file: its fragments, the names of the classes where the file states them, and the labels that occur."""

    fragments: tuple[Fragment, ...]
    class_names: tuple[str, ...] | None = None
    labels: frozenset[int | str] = field(default_factory=frozenset)


class RawSample(NamedTuple):
    """One sample as stored.

    image   encoded bytes, or an array uint8 [height, width] or [height, width, 3]; None when it could not be read
    label   as stored: a number, a name, or None
    reason  why the image could not be read, in words; "" when it could
    """

    sample_id: str
    image: bytes | np.ndarray | None
    label: int | str | None
    reason: str = ""


@dataclass(frozen=True)
class Preview:
    """A look into one file: what `raypipe inspect` shows is put together from some of these.

    drawn        samples from random places of the file
    samples      how many the file has; `counted`, or estimated from the part that was looked at
    labels       stored label (None: without one) -> samples, of those whose label was looked at
    class_names  where the file states them
    error        why the file cannot be read at all
    """

    drawn: tuple[RawSample, ...] = ()
    samples: float = 0
    counted: bool = True
    labels: Counter[int | str | None] = field(default_factory=Counter)
    class_names: tuple[str, ...] | None = None
    error: str = ""


class Source(abc.ABC):
    """A format. One subclass per file of this package, registered in `raypipe.sources`.

    scan_reads    how much of a file `scan` reads; nothing, where the listing says all there is to know
    reads_singly  whether `read` fetches the samples that are wanted without those between them
    """

    format: ClassVar[str]
    scan_reads: ClassVar[Literal["nothing", "part", "all"]] = "part"
    reads_singly: ClassVar[bool] = False

    def __init__(self, settings: SourceSettings) -> None:
        self.settings = settings

    def settled(self, image_size: int = 0) -> SourceSettings:
        """The settings with what `auto` and defaults stand for in this source, so that a worker need not look at it to find out.

        image_size  pixels, square, that are wanted of an image. Raises SourceError.
        """
        return self.settings.model_copy(update={"format": self.format})

    @property
    def ids_can_repeat(self) -> bool:
        """Whether ids are given by the data, so that two samples may share one, rather than made of paths."""
        return self.settings.id_column is not None

    @abc.abstractmethod
    def files(self) -> Iterator[SourceFile]:
        """Everything a listing shows, in a stable order, without opening a file. Raises SourceError when nothing is there."""

    @abc.abstractmethod
    def scan(self, file: SourceFile) -> FileScan:
        """Open one file just enough to count its samples and cut it into fragments of at most `fragment_samples`.

        A file that cannot be read gives one fragment without samples, with `error` set; only storage faults raise.
        """

    @abc.abstractmethod
    def read(self, fragment: Fragment, wanted: IdFilter | None = None) -> Iterator[RawSample]:
        """The samples of a fragment in order: exactly `fragment.samples` of them, unreadable ones with a reason.

        With `wanted`, samples for which it is false are left out, as far as possible without reading their images.
        """

    def listed_labels(self, file: SourceFile) -> Counter[int | str | None] | None:
        """How often each stored label (None: without one) occurs in a file, where that is known without opening it; else None."""
        return None

    def preview(
        self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool
    ) -> Preview:
        """Samples from random places of one file, and what else is to be had of it at little cost.

        places, each  so many runs of neighbouring samples, of that length at most
        whole         the file is small: everything is counted, and `places` times `each` single samples are drawn from all of it
        """
        scan = self.scan(file)
        error = next((fragment.error for fragment in scan.fragments if fragment.error), "")
        fragments = [fragment for fragment in scan.fragments if fragment.samples]
        drawn: list[RawSample] = []
        if whole or self.reads_singly:
            ids: dict[str, None] = {}
            for fragment in fragments:  # a pass that wants nothing, for the ids
                for _ in self.read(fragment, lambda sample_id: ids.update({sample_id: None})):
                    pass
            chosen = set(draw.sample(list(ids), min(len(ids), places * each)))
            for fragment in fragments:
                drawn += self.read(fragment, chosen.__contains__)
        else:
            for fragment in draw.sample(fragments, min(len(fragments), places)):
                with closing(self.read(fragment)) as samples:  # type: ignore[type-var]
                    drawn += islice(samples, each)
        labels = self.listed_labels(file)
        if labels is None:
            labels = Counter(sample.label for sample in drawn if not sample.reason)
        total = sum(fragment.samples for fragment in fragments)
        return Preview(tuple(drawn), total, True, labels, scan.class_names, error)

    def broken(self, file: SourceFile, error: object) -> FileScan:
        """The scan of a file that cannot be read."""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return FileScan(
            (
                Fragment(
                    self.fragment_id(file, 0, 0),
                    file.path,
                    0,
                    0,
                    members=file.members,
                    error=reason,
                ),
            )
        )

    def cut(
        self, file: SourceFile, samples: int, bounds: Sequence[int] = ()
    ) -> tuple[Fragment, ...]:
        """Fragments of a file with so many samples; cuts fall on `bounds` (such as row groups) where these are close enough."""
        limit, start, result = self.settings.fragment_samples, 0, []
        while start < samples:
            stop = min(start + limit, samples)
            inside = [bound for bound in bounds if start < bound <= stop]
            stop = inside[-1] if inside else stop
            result.append(
                Fragment(
                    self.fragment_id(file, start, stop),
                    file.path,
                    start,
                    stop,
                    members=file.members,
                )
            )
            start = stop
        return tuple(result)

    def fragment_id(self, file: SourceFile, start: int, stop: int) -> str:
        """A name fit for a file on any storage: readable start, then a hash of everything that identifies the content."""
        identity = "\0".join(
            (
                self.format,
                file.path,
                str(file.size),
                file.stamp,
                str(start),
                str(stop),
                *file.members,
            )
        )
        digest = hashlib.blake2b(
            identity.encode("utf-8", "surrogateescape"), digest_size=8
        ).hexdigest()
        readable = re.sub(
            r"[^A-Za-z0-9]+", "-", file.path.rsplit("/", 1)[-1].split(".", 1)[0]
        ).strip("-")[:40]
        return f"{readable or 'file'}-{start:07d}-{digest}"


IdFilter = Any
"""A function (sample_id: str) -> bool."""


@dataclass(frozen=True)
class ClassMap:
    """Stored label -> class index 0 .. C-1.

    names     one per class; for plain numbers, the numbers themselves
    noise     how labels are replaced for a rehearsal (`source.inject_noise`)
    clusters  the classes are clusters, of which no stored label says anything
    """

    names: tuple[str, ...]
    numeric: bool
    noise: LabelNoise | None = None
    clusters: bool = False

    def label_of(self, sample: RawSample) -> tuple[int, str]:
        """`index` of a sample's label, as everything in a run sees it: where it is replaced for a rehearsal, the wrong one."""
        label, reason = self.index(sample.label)
        if self.noise is not None:
            label = self.noise.wrong(sample.sample_id, label, len(self.names))
        return label, reason

    def index(self, label: int | str | None) -> tuple[int, str]:
        """Class index and "", or -1 and why the label is wrong. A missing label is -1 and "": such a sample is unlabelled."""
        if label is None or self.clusters:
            return -1, ""
        if isinstance(label, str):
            position = self._positions().get(label, -1)
            return (
                (position, "")
                if position >= 0
                else (-1, f"label {label!r} is not one of the {len(self.names)} classes")
            )
        if not self.numeric:
            return -1, f"label {label!r} is a number, but the classes have names"
        if 0 <= label < len(self.names):
            return int(label), ""
        return -1, f"label {label} is outside 0..{len(self.names) - 1}"

    def _positions(self) -> dict[str, int]:
        return _positions(self.names)


_position_cache: dict[tuple[str, ...], dict[str, int]] = {}


def _positions(names: tuple[str, ...]) -> dict[str, int]:
    if names not in _position_cache:
        _position_cache[names] = {name: index for index, name in enumerate(names)}
    return _position_cache[names]


def _as_many(names: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """The names, with numbers for classes without one."""
    if count is not None and count < len(names):
        raise SourceError(
            f"source.num_classes is {count}, but the source names {len(names)} classes, such as {names[-1]!r}; leave it out"
        )
    return (*names, *map(str, range(len(names), count or 0)))


MOST_CLASSES = 1_000_000


def class_map(
    class_names: tuple[str, ...] | None, labels: frozenset[int | str], num_classes: int | None
) -> ClassMap:
    """The classes of a source from what its files state. Raises SourceError when they do not fit together."""
    if class_names is not None:
        return ClassMap(_as_many(class_names, num_classes), numeric=True)
    numbers = {label for label in labels if isinstance(label, int)}
    words = {label for label in labels if isinstance(label, str)}
    if numbers and words:
        raise SourceError(
            f"labels are partly numbers (such as {min(numbers)}) and partly names (such as {min(words)!r}); use one kind"
        )
    if words:
        return ClassMap(_as_many(tuple(sorted(words)), num_classes), numeric=False)
    count = num_classes if num_classes is not None else max(numbers, default=-1) + 1
    if count > MOST_CLASSES:
        raise SourceError(
            f"the largest label is {count - 1}; if that is one wrong label, set source.num_classes"
        )
    return ClassMap(tuple(str(number) for number in range(count)), numeric=True)
