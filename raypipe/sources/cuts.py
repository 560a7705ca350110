"""Where a listing of small files is divided into runs, so that a later change touches few of them.

A run is the unit of work. If runs were counted off, one new file would shift all runs after it, and
all of these files would be processed again. So the names of the files decide where a run ends.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Cuts(enum.StrEnum):
    """Rules by which a listing is divided into runs.

    Attributes
    ----------
    LOWEST_HASH
        A run ends at the file with the lowest hash among those that give it between half the limit
        and the limit. A new file touches the run that it falls into. Seldom, with a probability of
        a few divided by the limit, it also moves the end of this run, and of one or two after it.
    MARKED
        The rule up to version 0.2.0, which existing indices keep: a run ends at a hash that the
        limit divides, or at the limit. More than a third of the runs end at the limit, and a new
        file moves the ends of all runs up to the next one that ends at a hash.
    """

    LOWEST_HASH = "lowest-hash"
    MARKED = "marked"


def divide(
    items: Iterable[Item], hash_of: Callable[[Item], int], limit: int, cuts: Cuts
) -> Iterator[list[Item]]:
    """Divide items into runs of at most `limit`.

    Parameters
    ----------
    items : iterable
        In a stable order. About `limit` of them are held.
    hash_of : callable
        Returns a number of 64 bits that depends on the name of an item alone.
    limit : int
        Maximum number of items in a run.
    cuts : Cuts
    """
    rule = _at_lowest_hash if cuts is Cuts.LOWEST_HASH else _at_marks
    yield from rule(items, hash_of, limit)


def _at_lowest_hash(
    items: Iterable[Item], hash_of: Callable[[Item], int], limit: int
) -> Iterator[list[Item]]:
    held: list[Item] = []
    hashes: list[int] = []
    least = (limit + 1) // 2
    for item in items:
        held.append(item)
        hashes.append(hash_of(item))
        if len(held) == limit:
            stop = min(range(least, limit + 1), key=lambda stop: hashes[stop - 1])
            yield held[:stop]
            del held[:stop], hashes[:stop]
    if held:
        yield held


def _at_marks(
    items: Iterable[Item], hash_of: Callable[[Item], int], limit: int
) -> Iterator[list[Item]]:
    held: list[Item] = []
    for item in items:
        held.append(item)
        if len(held) == limit or hash_of(item) % limit == 0:
            yield held
            held = []
    if held:
        yield held
