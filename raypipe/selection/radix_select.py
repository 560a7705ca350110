"""Exactly the first so many samples of every group, from a stream too long to sort or to hold.

A ranking gives every sample a uint32 key, the highest first, and a group. A few passes over the stream count how many samples
share the leading bits of the key (a radix histogram), and so pin down, bit by bit, the key at which each group ends. Memory depends
on the number of groups and quotas, never on the number of samples; only where several samples share that last key and not
all of them fit are 8 bytes for each of these held.

Samples with equal keys are taken in the order of a hash of their sample_id: the same ones on every machine and in
every order of the stream.
"""

from __future__ import annotations

import abc
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raypipe.errors import StageError
from raypipe.selection.hashing import Ids, id_hash, names_at

CELLS = 1 << 24
"""Most counters held at a time (8 bytes each, twice); with very many groups fewer bits are settled in one pass."""
EVERY = np.uint64(2**64 - 1)
NOTHING = np.uint32(2**32 - 1)  # above every key
FIRST = np.uint32(2**32 - 2)  # of samples that come before all others
HIGHEST = np.uint32(2**32 - 3)
"""The highest key a ranking may give; that of every finite score is below it."""
FREE, ALWAYS, NEVER = 0, 1, 2
"""Marks of a sample: for the strategy to decide, in every keep-list, in none."""


class Chunk(NamedTuple):
    """A part of the stream.

    score      float32 [n]
    label      int32 [n] with -1 for unlabelled
    sample_id  n ids, a list or an Arrow array; none unless asked for
    loss       float32 [n], the proxy's loss; None where no strategy asks for it
    mark       uint8 [n]: FREE, ALWAYS or NEVER; None: all are free
    """

    score: np.ndarray
    label: np.ndarray
    sample_id: Ids
    loss: np.ndarray | None = None
    mark: np.ndarray | None = None

    def eligible(self) -> np.ndarray:
        """bool [n]: samples that are not marked NEVER."""
        return np.ones(len(self.score), bool) if self.mark is None else self.mark != NEVER


Chunks = Callable[[bool], Iterable[Chunk]]
"""Starts the stream anew: the same samples each time; the argument says whether sample_ids are needed."""


class Checked:
    """A stream that counts its samples the first time, and refuses scores and losses that are not finite."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._read = False
        self.samples = 0

    def __call__(self, with_ids: bool) -> Iterator[Chunk]:
        """Raises StageError at the end of the first pass, in which nothing follows the first such number."""
        if self._read:
            yield from self._chunks(with_ids)
            return
        samples, bad, example, what = 0, 0, np.float32(0), "scores"
        for chunk in self._chunks(with_ids):
            samples += len(chunk.score)
            for name, values in (
                ("scores", np.asarray(chunk.score, np.float32)),
                ("losses", chunk.loss),
            ):
                if values is not None and not np.isfinite(values).all():
                    infinite = values[~np.isfinite(values)]
                    bad, example, what = bad + len(infinite), infinite[0], name
            if not bad:
                yield chunk
        if bad:
            raise StageError(
                f"{bad} of {samples} {what} are not finite (such as {example}), so they have no order; score them again"
            )
        self._read, self.samples = True, samples


class Ranking(abc.ABC):
    """An order of the samples within groups.

    groups     how many groups there are
    needs_ids  whether it looks at sample_ids
    """

    groups: int = 1
    needs_ids: bool = False
    _last: tuple[Chunk, np.ndarray, np.ndarray] | None = None

    @abc.abstractmethod
    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Key uint32 [n], the highest first, and group int64 [n], -1: out of the question."""

    def place(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """As `rank`, with samples marked NEVER out of the question; asked again for the same chunk, it does not compute again."""
        if self._last is None or self._last[0] is not chunk:
            key, group = self.rank(chunk)
            if chunk.mark is not None:
                group = np.where(chunk.mark == NEVER, -1, group)
            self._last = (chunk, key, group)
        return self._last[1:]


Quotas = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(samples [G], of these the reserved ones [G]: key FIRST) -> samples to take [G]."""


@dataclass(frozen=True, eq=False)
class Boundary:
    """Where each group of a ranking ends: every key above a threshold, and of the ties there the lowest hashes.

    quota      int64 [G], samples taken; `size`: samples there; `reserved`: samples with the key FIRST
    threshold  uint32 [G + 1], key of the last sample taken; the last one is for samples out of the question
    limit      uint64 [G + 1], the highest hash taken among samples with that key
    """

    ranking: Ranking
    quota: np.ndarray
    size: np.ndarray
    reserved: np.ndarray
    threshold: np.ndarray
    limit: np.ndarray

    @property
    def count(self) -> int:
        """Samples taken."""
        return int(self.quota.sum())

    @property
    def needs_ids(self) -> bool:
        """Whether `mask` looks at sample_ids."""
        return self.ranking.needs_ids or bool((self.limit != EVERY).any())

    def mask(self, chunk: Chunk) -> np.ndarray:
        """Which samples of a chunk are taken: bool [n]."""
        key, group = self.ranking.place(chunk)
        threshold = self.threshold[group]
        kept = key > threshold
        tied = np.flatnonzero(key == threshold)
        limit = self.limit[group[tied]]
        kept[tied] = limit == EVERY
        contested = tied[limit != EVERY]
        hashes = np.fromiter(
            map(id_hash, names_at(chunk.sample_id, contested)), np.uint64, len(contested)
        )
        kept[contested] = hashes <= limit[limit != EVERY]
        return kept


def boundaries(chunks: Chunks, wants: Sequence[tuple[Ranking, Quotas]]) -> list[Boundary]:
    """Where each ranking ends for its quotas, all from the same passes over the stream. Raises what `quotas` raise."""
    rankings = {id(ranking): ranking for ranking, _ in wants}
    with_ids = any(ranking.needs_ids for ranking in rankings.values())
    slots = sum(ranking.groups for ranking, _ in wants)
    bits = max(1, min(16, (CELLS // max(slots, 1)).bit_length() - 1))

    counted, reserved = _count_first(chunks, with_ids, rankings, bits)
    sizes = {which: table.sum(axis=1) for which, table in counted.items()}
    quota = [quotas(sizes[id(ranking)], reserved[id(ranking)]) for ranking, quotas in wants]
    ends = [_End(ranking, taken.copy()) for (ranking, _), taken in zip(wants, quota, strict=True)]
    for end in ends:
        end.descend(counted[id(end.ranking)], bits)
    counted.clear()  # the next tables are as large
    settled = bits
    while settled < 32:
        step = min(bits, 32 - settled)
        for end, table in zip(
            ends, _count_next(chunks, with_ids, ends, settled, step), strict=True
        ):
            end.descend(table, step)
        settled += step

    thresholds = [
        np.append(np.where(taken > 0, end.prefix, NOTHING), NOTHING)
        for end, taken in zip(ends, quota, strict=True)
    ]
    contested = [
        (taken > 0) & (end.left < end.tied) for end, taken in zip(ends, quota, strict=True)
    ]
    limits = _limits(chunks, ends, thresholds, contested)
    return [
        Boundary(
            end.ranking, taken, sizes[id(end.ranking)], reserved[id(end.ranking)], threshold, limit
        )
        for end, taken, threshold, limit in zip(ends, quota, thresholds, limits, strict=True)
    ]


def order_key(score: np.ndarray) -> np.ndarray:
    """float32 [n] -> uint32 [n] in the same order, infinities included; 0.0 and -0.0 are equal, as they are as numbers."""
    bits = (np.asarray(score, np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def key_value(key: np.ndarray) -> np.ndarray:
    """The float32 of which `order_key` made a key."""
    return (
        np.where(key >> np.uint32(31), key ^ np.uint32(1 << 31), ~key)
        .astype(np.uint32)
        .view(np.float32)
    )


def class_groups(label: np.ndarray, classes: int) -> np.ndarray:
    """int64 [n]: the class, with `classes` for the unlabelled. Raises StageError for a label beyond them."""
    if len(label) and int(label.max()) >= classes:
        raise StageError(
            f"label {int(label.max())} among the scores, but the source has {classes} classes; score it again"
        )
    return np.where(label < 0, classes, label).astype(np.int64)


class _End:
    """How far the end of a ranking is known: of each group [G] the leading bits, what to take of them, and what there is."""

    def __init__(self, ranking: Ranking, left: np.ndarray) -> None:
        self.ranking, self.left = ranking, left
        self.prefix, self.tied = np.zeros(len(left), np.uint32), np.zeros_like(left)

    def descend(self, table: np.ndarray, step: int) -> None:
        """Settle the next bits: table [G, 2^step] counts, of the samples with the prefix, which bits follow.

        First which run of cells the end is in, then which cell of it, so that not all cells are added up one by one.
        """
        runs = table.reshape(len(table), 1 << step // 2, -1)
        run, self.left, _ = _end_of(runs.sum(axis=2), self.left)
        cell, self.left, self.tied = _end_of(runs[np.arange(len(runs)), run], self.left)
        self.prefix = self.prefix << np.uint32(step) | (run * runs.shape[2] + cell).astype(
            np.uint32
        )


def _end_of(counts: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row of [G, n] counts, from its end on: the cell in which `left` [G] are reached, else the first one; what is left to take
    there, and the count there."""
    from_top, rows = np.cumsum(counts[:, ::-1], axis=1), np.arange(len(counts))
    steps = np.minimum((from_top < left[:, None]).sum(axis=1), counts.shape[1] - 1)
    cell = counts.shape[1] - 1 - steps
    there = counts[rows, cell]
    return cell, left - (from_top[rows, steps] - there), there


def _count_first(
    chunks: Chunks, with_ids: bool, rankings: dict[int, Ranking], bits: int
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Per ranking int64 [G, 2^bits]: samples by group and leading bits of the key; and [G]: samples with the key FIRST."""
    tables = {
        which: np.zeros((ranking.groups, 1 << bits), np.int64)
        for which, ranking in rankings.items()
    }
    reserved = {which: np.zeros(ranking.groups, np.int64) for which, ranking in rankings.items()}
    for chunk in chunks(with_ids):
        for which, ranking in rankings.items():
            key, group = ranking.place(chunk)
            if group.min(initial=0) < 0:
                key, group = key[group >= 0], group[group >= 0]
            np.add.at(tables[which].reshape(-1), (group << bits) + (key >> np.uint32(32 - bits)), 1)
            np.add.at(reserved[which], group[key == FIRST], 1)
    return tables, reserved


def _count_next(
    chunks: Chunks, with_ids: bool, ends: list[_End], settled: int, step: int
) -> list[np.ndarray]:
    """Per end int64 [G, 2^step]: of the samples whose first `settled` bits are the group's prefix, how many have which next bits."""
    tables = [np.zeros((len(end.prefix), 1 << step), np.int64) for end in ends]
    for chunk in chunks(with_ids):
        for end, table in zip(ends, tables, strict=True):
            key, group = end.ranking.place(chunk)
            hit = np.flatnonzero(
                (key >> np.uint32(32 - settled) == end.prefix[group]) & (group >= 0)
            )
            following = (key[hit] >> np.uint32(32 - settled - step)) & np.uint32((1 << step) - 1)
            np.add.at(table.reshape(-1), (group[hit] << step) + following, 1)
    return tables


def _limits(
    chunks: Chunks, ends: list[_End], thresholds: list[np.ndarray], contested: list[np.ndarray]
) -> list[np.ndarray]:
    """Per end uint64 [G + 1]: the `left`-th lowest hash among the samples at the threshold, where not all of them fit."""
    limits = [np.full(len(threshold), EVERY) for threshold in thresholds]
    where = [
        (number, int(group))
        for number, groups in enumerate(contested)
        for group in np.flatnonzero(groups)
    ]
    if not where:
        return limits
    hashes: dict[tuple[int, int, int], array[int]] = {
        (id(ends[number].ranking), group, int(thresholds[number][group])): array("Q")
        for number, group in where
    }
    for chunk in chunks(True):
        found: dict[int, np.ndarray] = {}
        for end, threshold, groups in zip(ends, thresholds, contested, strict=True):
            key, group = end.ranking.place(chunk)
            tied = np.append(groups, False)[group] & (key == threshold[group])
            found[id(end.ranking)] = (
                found[id(end.ranking)] | tied if id(end.ranking) in found else tied
            )
        for end in {id(end.ranking): end for end in ends}.values():
            key, group = end.ranking.place(chunk)
            positions = np.flatnonzero(found[id(end.ranking)])
            for position, name in zip(
                positions.tolist(), names_at(chunk.sample_id, positions), strict=True
            ):
                hashes[id(end.ranking), int(group[position]), int(key[position])].append(
                    id_hash(name)
                )
    for number, which in where:
        known = np.frombuffer(
            hashes[id(ends[number].ranking), which, int(thresholds[number][which])], np.uint64
        )
        last = int(ends[number].left[which]) - 1
        if last >= len(known):
            raise StageError(
                "the scores changed while the keep-lists were being made; run it again"
            )
        limits[number][which] = np.partition(known, last)[last]
    return limits
