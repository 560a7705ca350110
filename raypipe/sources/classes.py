"""The classes of a source: from stored labels to class indices."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.noise import LabelNoise
from raypipe.sources.types import RawSample

MAX_CLASSES = 1_000_000
"""More classes than this are taken for one wrong label."""
MIN_FOR_NOTE = 20
"""Samples from which on many classes are remarkable."""
_MISSING = frozenset({"nan", "none", "null", "n/a", "<na>", "nat"})
"""What programs write for a missing value, in lower case."""
SHOWN_NAMES = 5
"""Class names that a message lists."""


@dataclass(frozen=True)
class ClassMap:
    """Maps stored labels to class indices 0 .. C-1.

    Attributes
    ----------
    names : tuple of str
        One per class. For plain numbers, the numbers themselves.
    numeric : bool
        Whether stored labels are numbers rather than names.
    noise : LabelNoise or None
        How labels are replaced in a rehearsal (`source.inject_noise`).
    clusters : bool
        The classes are clusters, so stored labels are ignored.
    """

    names: tuple[str, ...]
    numeric: bool
    noise: LabelNoise | None = None
    clusters: bool = False

    @property
    def bare_numbers(self) -> bool:
        """Whether the only name of every class is its number."""
        return _bare_numbers(self.names)

    def label_of(self, sample: RawSample) -> tuple[int, str]:
        """Return `index` of a sample's label as the run sees it, with injected noise applied."""
        label, reason = self.index(sample.label)
        if self.noise is not None:
            label = self.noise.wrong(sample.sample_id, label, len(self.names))
        return label, reason

    def index(self, label: int | str | None) -> tuple[int, str]:
        """Return the class index of a stored label, and "" or why the label is invalid.

        Both invalid and missing labels have index -1. A missing label has reason "": such a
        sample is unlabelled, not rejected. The number -1 is a missing label in every format.
        """
        if label is None or label == -1 or self.clusters:
            return -1, ""
        if isinstance(label, str):
            position = _positions(self.names).get(label, -1)
            if position >= 0:
                return position, ""
            return -1, f"label {label!r} is not one of the {len(self.names)} classes"
        if not self.numeric:
            return -1, f"label {label!r} is a number, but the classes have names"
        if 0 <= label < len(self.names):
            return int(label), ""
        return -1, f"label {label} is outside 0..{len(self.names) - 1}"


@dataclass(frozen=True)
class MatchedClasses:
    """The classes of another source, such as a test set, as classes of a run.

    Attributes
    ----------
    other : ClassMap
        Classes of the other source.
    places : tuple of int
        For each of them the class of the run with the same name, or -1.
    """

    other: ClassMap
    places: tuple[int, ...]

    def index(self, label: int | str | None) -> int:
        """Return the run's class for a stored label of the other source, or -1."""
        position, _ = self.other.index(label)
        return self.places[position] if position >= 0 else -1

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the classes that the run does not have."""
        return tuple(
            name for name, place in zip(self.other.names, self.places, strict=True) if place < 0
        )

    @property
    def same_numbers(self) -> bool:
        """Whether every class has the same number in both."""
        return self.places == tuple(range(len(self.places)))


def match_classes(own: ClassMap, other: ClassMap) -> MatchedClasses:
    """Match the classes of two sources by name.

    Numbers without names match names only if name and number of every class agree, as with the
    folders 0 to 9.

    Raises
    ------
    SourceError
        If only one of the two has names, or they share none. The message does not name the sources.
    """
    if not own.names or not other.names:
        return MatchedClasses(other, (-1,) * len(other.names))
    if own.bare_numbers != other.bare_numbers:
        named, side, bare = (own, "the run", "the other source")
        if own.bare_numbers:
            named, side, bare = (other, "the other source", "the run")
        raise SourceError(
            f"the classes of {side} have names ({shown_names(named.names)}), but those of {bare} "
            "are numbers without names, so they cannot be matched"
        )
    positions = _positions(own.names)
    places = tuple(positions.get(name, -1) for name in other.names)
    if max(places) < 0:
        raise SourceError(
            f"none of its classes ({shown_names(other.names)}) is a class of the run "
            f"({shown_names(own.names)})"
        )
    return MatchedClasses(other, places)


def shown_names(names: Iterable[str]) -> str:
    """Return the first few names, for a message."""
    listed = list(names)
    return ", ".join(listed[:SHOWN_NAMES]) + (", ..." if len(listed) > SHOWN_NAMES else "")


class StatedNames:
    """The class names that the files of one source state.

    Files can state the same names in another order, or more of them, if their labels are read as
    names (see `Source.labels_by_name`). The order of the first file counts.

    Attributes
    ----------
    names : tuple of str or None
        The names stated so far.
    """

    def __init__(self, by_name: bool) -> None:
        self._by_name = by_name
        self.names: tuple[str, ...] | None = None
        self._named_in = self._numbers_in = ""

    def add(
        self, path: str, names: tuple[str, ...] | None, labels: Iterable[int | str | None]
    ) -> None:
        """Add a file: the names that it states, and its labels.

        Raises
        ------
        SourceError
            If the names contradict those of the files before it, or some files name their classes
            while others have only numbers.
        """
        if names is not None:
            self._add_names(path, names)
        elif self._by_name and any(isinstance(label, int) for label in labels):
            self._numbers_in = self._numbers_in or path
        if self._numbers_in and self.names is not None and not _bare_numbers(self.names):
            raise SourceError(
                f"{self._named_in} names its classes, but {self._numbers_in} has numbers without "
                "names, so their labels cannot be matched; set source.include so that only one "
                "kind of file is read"
            )

    def _add_names(self, path: str, names: tuple[str, ...]) -> None:
        if self.names is None:
            self.names, self._named_in = names, path
        if names == self.names:
            return
        known, stated = set(self.names), set(names)
        if not (
            self._by_name
            and distinct(self.names)
            and distinct(names)
            and (known <= stated or stated <= known)
        ):
            raise SourceError(
                f"{path} states other class names than the files before it; set "
                "source.include so that only one kind of file is read"
            )
        self.names = (*self.names, *(name for name in names if name not in known))


class LabelSpellings:
    """Checks that all files of a source spell the same number alike.

    "1" and "01" can be names of two classes, but are read as one number.
    """

    def __init__(self) -> None:
        self._usual: set[int | str] = set()
        self._padded: dict[int, tuple[str, str]] = {}
        self._first: dict[type, tuple[str, int | str]] = {}

    def add(self, path: str, labels: Collection[int | str], padded: Iterable[str]) -> None:
        """Add a file: its labels, and how it spells numbers that it spells unusually.

        Raises
        ------
        SourceError
            If the file, or one before it, spells a number differently.
        """
        for label in labels:
            self._first.setdefault(type(label), (path, label))
        own: dict[int, str] = {}
        for spelling in sorted(padded):
            own[int(spelling)] = spelling
            first, before = self._padded.setdefault(int(spelling), (spelling, path))
            if first != spelling:
                raise _spelled_differently(path, spelling, first, before)
        self._usual.update(labels if not own else set(labels) - own.keys())
        for number in self._padded.keys() & self._usual:
            spelling, before = self._padded[number]
            raise _spelled_differently(before, spelling, str(number), "another file")

    @property
    def mixed(self) -> str:
        """The message that some labels are numbers and others are names; "" if it is not so."""
        if len(self._first) < 2:
            return ""
        (number_in, number), (name_in, name) = self._first[int], self._first[str]
        place = "the same file" if name_in == number_in else number_in
        return (
            f"{name_in}: labels are partly names (such as {name!r}), but in {place} partly numbers "
            f"(such as {number}); write all labels as numbers, or all as names"
        )


def _spelled_differently(path: str, spelling: str, other: str, place: str) -> SourceError:
    where = "the same file" if place == path else place
    return SourceError(
        f"{path}: label {spelling!r} is the same number as {other!r} in {where}; write all labels "
        "of a class alike, or, if these are two classes, put a letter before the names of all "
        "classes"
    )


@functools.cache
def _bare_numbers(names: tuple[str, ...]) -> bool:
    return names == tuple(map(str, range(len(names))))


@functools.cache
def distinct(names: tuple[str, ...]) -> bool:
    """Return whether no two classes share a name."""
    return len(set(names)) == len(names)


@functools.cache
def _positions(names: tuple[str, ...]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


def class_map(
    class_names: tuple[str, ...] | None, labels: frozenset[int | str], num_classes: int | None
) -> ClassMap:
    """Return the classes of a source.

    Parameters
    ----------
    class_names : tuple of str or None
        As the source's files state them.
    labels : frozenset of int or str
        The distinct stored labels; used if `class_names` is None.
    num_classes : int or None
        `source.num_classes`.

    Raises
    ------
    SourceError
        If the three contradict one another, or labels mix numbers and names.
    """
    if class_names is not None:
        return ClassMap(_pad_names(class_names, num_classes), numeric=True)
    numbers = {label for label in labels if isinstance(label, int)}
    names = {label for label in labels if isinstance(label, str)}
    if numbers and names:
        raise SourceError(
            f"labels are partly numbers (such as {min(numbers)}) and partly names "
            f"(such as {min(names)!r}); use one kind"
        )
    if names:
        return ClassMap(_pad_names(tuple(sorted(names)), num_classes), numeric=False)
    count = num_classes if num_classes is not None else max(numbers, default=-1) + 1
    if count > MAX_CLASSES:
        raise SourceError(_too_large(sorted(numbers), count))
    return ClassMap(tuple(str(number) for number in range(count)), numeric=True)


def refuse_missing_labels(settings: SourceSettings, labels: Collection[object]) -> None:
    """Raise SourceError if the settings name a field for the labels that no sample has."""
    if settings.label_column not in (None, "auto") and not labels:
        raise SourceError(
            f"{settings.uri}: no sample has a label: source.label_column is "
            f"{settings.label_column!r}, which none of them has; correct it, or leave it out for "
            "the usual names (null: the source has no labels)"
        )


def _several_labels(names: Collection[str]) -> str:
    """Return a name that is a list of labels which other names have too, such as cat|dog; or "".

    A comma alone is no sign: synonyms, as in ImageNet's names, are seldom in two classes.
    """
    for separator in "|;,":
        lists = [name for name in names if separator in name]
        parts = Counter(
            part.strip() for name in names for part in set(name.split(separator)) if part.strip()
        )
        listed = {part.strip() for name in lists for part in name.split(separator)} - {""}
        if lists and 2 * sum(parts[part] > 1 for part in listed) > len(listed):
            return min(lists)
    return ""


def names_note(names: Collection[str]) -> str:
    """Return a warning of names that may mean the same class, or a missing label; or ""."""
    alike: dict[str, str] = {}
    for name in names:
        folded = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        other = alike.setdefault(folded, name)
        if other != name:
            return (
                f"the classes {other!r} and {name!r} differ in case, blanks or Unicode form only; "
                "if they are one class, write its labels alike"
            )
    if several := _several_labels(names):
        return (
            f"the class {several!r} seems to be several labels; a sample has one label, so each "
            "combination is a class of its own. Choose one label a sample"
        )
    missing = sorted(name for name in names if name.casefold().strip() in _MISSING)
    if not missing:
        return ""
    return (
        f"a class is called {missing[0]!r}; if its samples have no label, leave their label empty"
    )


def sparse_classes_note(labels: Collection[int | str], classes: int) -> str:
    """Return a warning if most of the numbered classes have no sample, as with ids; or ""."""
    if classes < MIN_FOR_NOTE or 2 * len(labels) > classes or isinstance(next(iter(labels)), str):
        return ""
    return (
        f"only {len(labels):,} of the classes 0 to {classes - 1:,} have samples. Are the labels "
        "ids of classes? Store them as text, which makes them names, or number the classes from 0"
    )


def lone_classes_note(samples: int, classes: int) -> str:
    """Return a warning if most classes can have one sample only, as with captions; or ""."""
    if samples < MIN_FOR_NOTE or classes <= samples / 2:
        return ""
    return (
        f"{classes:,} classes in {samples:,} samples: nearly every sample is a class of its own. "
        "Are the labels captions or ids? Set source.label_column to the column of the classes, or "
        "to null for none (pseudo_labels)"
    )


def _too_large(numbers: list[int], count: int) -> str:
    """Return the message about a class number that no list of classes can reach."""
    if not numbers or numbers[-1] < count - 1:
        return f"source.num_classes is {count}; at most {MAX_CLASSES:,} are possible"
    usual = [number for number in numbers if number < MAX_CLASSES]
    if len(usual) > 0.9 * len(numbers) or len(numbers) < 3:
        return (
            f"the largest label is {count - 1}; if that is one wrong label, set source.num_classes"
        )
    return (
        f"the {len(numbers):,} labels are numbers up to {count - 1}, which look like ids of "
        "classes; classes are numbered from 0 without gaps. Store the ids as text, which makes "
        "them names, or number the classes"
    )


def _pad_names(names: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """Return the names, followed by numbers for the classes up to `count` that have none."""
    if count is not None and count < len(names):
        raise SourceError(
            f"source.num_classes is {count}, but the source names {len(names)} classes, such as "
            f"{names[-1]!r}; leave it out"
        )
    return (*names, *map(str, range(len(names), count or 0)))
