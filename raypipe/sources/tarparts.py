"""Find the parts of one sample in a tar that does not store them one after the other.

`0.jpg 1.jpg 0.cls 1.cls` has two samples of two parts each. Members of one key belong together if
no two of them have the same extension; otherwise the later ones repeat the sample.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from raypipe.sources.tarfiles import Group


class Kind(enum.Enum):
    """What a group is to the groups before it."""

    NEW = "the first with its key"
    PART = "another part of an earlier sample"
    REPEAT = "a repetition of an earlier sample"


class KeyHistory:
    """The keys of a tar and their extensions so far."""

    def __init__(self) -> None:
        self._extensions: dict[str, frozenset[str]] = {}
        self._shared: dict[frozenset[str], frozenset[str]] = {}  # one object for equal sets

    def kind(self, group: Group) -> Kind:
        """Return what the next group of the tar is."""
        known, names = self._extensions.get(group.key), frozenset(group.names)
        if known is not None and (not names or not known.isdisjoint(names)):
            return Kind.REPEAT
        every = names if known is None else known | names
        self._extensions[group.key] = self._shared.setdefault(every, every)
        return Kind.NEW if known is None else Kind.PART


@dataclass
class JoinedSample:
    """A sample with all of its parts; `repeated` if an earlier sample has its key."""

    group: Group
    repeated: bool


def join_parts(groups: Iterable[Group]) -> list[JoinedSample]:
    """Return the samples of a whole tar in the order of their first parts.

    A sample has a reason if one of its parts has one.
    """
    history, first = KeyHistory(), dict[str, Group]()
    result: list[JoinedSample] = []
    for group in groups:
        kind = history.kind(group)
        if kind is Kind.PART:
            whole = first[group.key]
            whole.names |= group.names
            whole.contents |= group.contents
            whole.reason = whole.reason or group.reason
            continue
        first.setdefault(group.key, group)
        result.append(JoinedSample(group, kind is Kind.REPEAT))
    return result
