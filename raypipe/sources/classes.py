"""The classes of a source: from stored labels to class indices."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from raypipe.errors import SourceError
from raypipe.sources.base import RawSample
from raypipe.sources.noise import LabelNoise

MAX_CLASSES = 1_000_000
"""More classes than this are taken for one wrong label."""


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

    def label_of(self, sample: RawSample) -> tuple[int, str]:
        """Return `index` of a sample's label as the run sees it, with injected noise applied."""
        label, reason = self.index(sample.label)
        if self.noise is not None:
            label = self.noise.wrong(sample.sample_id, label, len(self.names))
        return label, reason

    def index(self, label: int | str | None) -> tuple[int, str]:
        """Return the class index of a stored label, and "" or why the label is invalid.

        Both invalid and missing labels have index -1. A missing label has reason "": such a
        sample is unlabelled, not rejected.
        """
        if label is None or self.clusters:
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
        raise SourceError(
            f"the largest label is {count - 1}; if that is one wrong label, set source.num_classes"
        )
    return ClassMap(tuple(str(number) for number in range(count)), numeric=True)


def _pad_names(names: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """Return the names, followed by numbers for the classes up to `count` that have none."""
    if count is not None and count < len(names):
        raise SourceError(
            f"source.num_classes is {count}, but the source names {len(names)} classes, such as "
            f"{names[-1]!r}; leave it out"
        )
    return (*names, *map(str, range(len(names), count or 0)))
