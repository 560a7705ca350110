"""Select exactly the first k samples of every group from a stream too long to sort or to hold.

A ranking gives every sample a uint32 key, highest first, and a group. A few passes over the
stream count how many samples share the leading bits of the key (a radix histogram), and so
determine, bit by bit, the key at which each group ends. Memory depends on the number of groups
and quotas, never on the number of samples. The exception: if several samples share that last key
and not all of them fit, 8 bytes are held for each of them.

Samples with equal keys are taken in the order of a hash of their sample_id: the same samples on
every machine and in every order of the stream.
"""

from __future__ import annotations

import abc
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raypipe.errors import ConfigError, StageError
from raypipe.selection.hashing import Ids, id_hash, ids_at

MAX_COUNTERS = 1 << 24
"""Counters held at a time (8 bytes each, twice); with many groups a pass settles fewer bits."""
ANY_HASH = np.uint64(2**64 - 1)
"""Limit of hashes where all samples with the last key are taken."""
ABOVE_EVERY_KEY = np.uint32(2**32 - 1)
"""Threshold where no sample is taken."""
RESERVED_KEY = np.uint32(2**32 - 2)
"""Key of samples that come before all others."""
MAX_KEY = np.uint32(2**32 - 3)
"""The highest key a ranking can return; those of finite scores are below it."""
FREE, ALWAYS, NEVER = 0, 1, 2
"""Marks of a sample: the strategy decides, in every keep-list, in no keep-list."""


class Chunk(NamedTuple):
    """A part of the stream.

    Attributes
    ----------
    score : np.ndarray
        float32 [n].
    label : np.ndarray
        int32 [n]; -1 for unlabelled samples.
    sample_id : Sequence[str] or pa.Array
        n ids; empty unless requested.
    loss : np.ndarray, optional
        The proxy's loss, float32 [n]; None if no strategy needs it.
    mark : np.ndarray, optional
        FREE, ALWAYS or NEVER, uint8 [n]; None if all are free.
    position : int, optional
        Number of samples of the stream before this chunk; None if no strategy needs it.
    margin : np.ndarray, optional
        The proxy's margin, float32 [n]; None if no strategy needs it.
    """

    score: np.ndarray
    label: np.ndarray
    sample_id: Ids
    loss: np.ndarray | None = None
    mark: np.ndarray | None = None
    position: int | None = None
    margin: np.ndarray | None = None

    def eligible(self) -> np.ndarray:
        """Return which samples are not marked NEVER, bool [n]."""
        return np.ones(len(self.score), bool) if self.mark is None else self.mark != NEVER


Chunks = Callable[[bool], Iterable[Chunk]]
"""Starts a pass over the stream: the same samples each time, with sample_ids if given True."""
EmbeddedChunks = Callable[[], Iterable[tuple[Chunk, np.ndarray]]]
"""Starts a pass over the stream in the same order: chunks with sample_ids and position, and the
embeddings of their samples, float [n, d]."""


class ValidatedStream:
    """A stream whose first pass counts the samples and refuses non-finite scores and losses.

    Attributes
    ----------
    samples : int
        Number of samples; 0 until the first pass is complete.
    """

    def __init__(self, chunks: Chunks, embedded: EmbeddedChunks | None = None) -> None:
        self._chunks, self._embedded = chunks, embedded
        self._validated = False
        self.samples = 0

    def __call__(self, with_ids: bool) -> Iterator[Chunk]:
        """Yield the chunks.

        The first pass yields nothing after a non-finite value; at its end it raises StageError with
        their number.
        """
        if self._validated:
            yield from self._chunks(with_ids)
            return
        samples, bad, example, kind = 0, 0, np.float32(0), "scores"
        for chunk in self._chunks(with_ids):
            samples += len(chunk.score)
            for name, values in (
                ("scores", np.asarray(chunk.score, np.float32)),
                ("losses", chunk.loss),
                ("margins", chunk.margin),
            ):
                if values is not None and not np.isfinite(values).all():
                    infinite = values[~np.isfinite(values)]
                    bad, example, kind = bad + len(infinite), infinite[0], name
            if not bad:
                yield chunk
        if bad:
            raise StageError(
                f"{bad} of {samples} {kind} are not finite (such as {example}) and cannot be "
                "ranked; score the samples again"
            )
        self._validated, self.samples = True, samples

    def embedded(self) -> Iterable[tuple[Chunk, np.ndarray]]:
        """Start a pass over chunks with embeddings; raise ConfigError if the stream has none."""
        if self._embedded is None:
            raise ConfigError("this strategy needs embeddings, and the stream has none")
        return self._embedded()


class Ranking(abc.ABC):
    """An order of the samples within groups.

    A subclass implements `compute`; callers use `rank`.

    Attributes
    ----------
    groups : int
        Number of groups.
    needs_ids : bool
        Whether it uses sample_ids.
    """

    groups: int = 1
    needs_ids: bool = False
    _last: tuple[Chunk, np.ndarray, np.ndarray] | None = None

    @abc.abstractmethod
    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Return key, uint32 [n], highest first, and group, int64 [n]; group -1 is excluded."""

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and groups of a chunk, with samples marked NEVER excluded.

        The result for the latest chunk is cached.
        """
        if self._last is None or self._last[0] is not chunk:
            key, group = self.compute(chunk)
            if chunk.mark is not None:
                group = np.where(chunk.mark == NEVER, -1, group)
            self._last = (chunk, key, group)
        return self._last[1:]


Quotas = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(samples per group [G], those of them with RESERVED_KEY [G]) -> samples to take per group [G]."""


@dataclass(frozen=True, eq=False)
class Boundary:
    """Where each group of a ranking ends.

    Taken are all keys above a threshold, and of the ties at the threshold the lowest hashes.

    Attributes
    ----------
    ranking : Ranking
        The ranking.
    quota : np.ndarray
        Samples taken per group, int64 [G].
    size : np.ndarray
        Samples per group, int64 [G].
    reserved : np.ndarray
        Samples per group with RESERVED_KEY, int64 [G].
    threshold : np.ndarray
        Key of the last sample taken, uint32 [G + 1]; the last entry is for excluded samples.
    limit : np.ndarray
        The highest hash taken among samples with that key, uint64 [G + 1].
    """

    ranking: Ranking
    quota: np.ndarray
    size: np.ndarray
    reserved: np.ndarray
    threshold: np.ndarray
    limit: np.ndarray

    @property
    def count(self) -> int:
        """Number of samples taken."""
        return int(self.quota.sum())

    @property
    def needs_ids(self) -> bool:
        """Whether `mask` uses sample_ids."""
        return self.ranking.needs_ids or bool((self.limit != ANY_HASH).any())

    def mask(self, chunk: Chunk) -> np.ndarray:
        """Return which samples of a chunk are taken, bool [n]."""
        key, group = self.ranking.rank(chunk)
        threshold = self.threshold[group]
        kept = key > threshold
        tied = np.flatnonzero(key == threshold)
        limit = self.limit[group[tied]]
        kept[tied] = limit == ANY_HASH
        contested = tied[limit != ANY_HASH]
        hashes = np.fromiter(
            map(id_hash, ids_at(chunk.sample_id, contested)), np.uint64, len(contested)
        )
        kept[contested] = hashes <= limit[limit != ANY_HASH]
        return kept


def find_boundaries(chunks: Chunks, requests: Sequence[tuple[Ranking, Quotas]]) -> list[Boundary]:
    """Return where each ranking ends for its quotas, from the same passes over the stream.

    Exceptions that the quotas raise are not caught.
    """
    rankings = {id(ranking): ranking for ranking, _ in requests}
    with_ids = any(ranking.needs_ids for ranking in rankings.values())
    groups = sum(ranking.groups for ranking, _ in requests)
    bits = max(1, min(16, (MAX_COUNTERS // max(groups, 1)).bit_length() - 1))

    counted, reserved = _count_first(chunks, with_ids, rankings, bits)
    sizes = {which: table.sum(axis=1) for which, table in counted.items()}
    quota = [quotas(sizes[id(ranking)], reserved[id(ranking)]) for ranking, quotas in requests]
    searches = [
        _BoundarySearch(ranking, taken.copy())
        for (ranking, _), taken in zip(requests, quota, strict=True)
    ]
    for search in searches:
        search.descend(counted[id(search.ranking)], bits)
    counted.clear()  # the next tables are as large
    settled = bits
    while settled < 32:
        step = min(bits, 32 - settled)
        tables = _count_next(chunks, with_ids, searches, settled, step)
        for search, table in zip(searches, tables, strict=True):
            search.descend(table, step)
        settled += step

    thresholds = [
        np.append(np.where(taken > 0, search.prefix, ABOVE_EVERY_KEY), ABOVE_EVERY_KEY)
        for search, taken in zip(searches, quota, strict=True)
    ]
    contested = [
        (taken > 0) & (search.remaining < search.tied)
        for search, taken in zip(searches, quota, strict=True)
    ]
    limits = _hash_limits(chunks, searches, thresholds, contested)
    return [
        Boundary(
            search.ranking,
            taken,
            sizes[id(search.ranking)],
            reserved[id(search.ranking)],
            threshold,
            limit,
        )
        for search, taken, threshold, limit in zip(searches, quota, thresholds, limits, strict=True)
    ]


def order_key(score: np.ndarray) -> np.ndarray:
    """Map float32 [n] to uint32 [n] in the same order; 0.0 and -0.0 are equal."""
    bits = (np.asarray(score, np.float32) + np.float32(0)).view(np.uint32)
    negative = (bits.view(np.int32) >> np.int32(31)).view(np.uint32)  # all ones, else 0
    return bits ^ (negative | np.uint32(1 << 31))


def key_value(key: np.ndarray) -> np.ndarray:
    """Return the float32 that `order_key` mapped to a key."""
    return (
        np.where(key >> np.uint32(31), key ^ np.uint32(1 << 31), ~key)
        .astype(np.uint32)
        .view(np.float32)
    )


def class_groups(label: np.ndarray, classes: int) -> np.ndarray:
    """Return the class of each label, int64 [n], with `classes` for the unlabelled.

    Raises
    ------
    StageError
        If a label is not below `classes`.
    """
    if len(label) and int(label.max()) >= classes:
        raise StageError(
            f"label {int(label.max())} among the scores, but the source has {classes} classes; "
            "score the samples again"
        )
    return np.where(label < 0, classes, label).astype(np.int64)


class _BoundarySearch:
    """The search for the boundary of a ranking, bit by bit from the highest bits of the key.

    Attributes
    ----------
    ranking : Ranking
        The ranking.
    prefix : np.ndarray
        The leading bits of each group's threshold settled so far, uint32 [G].
    remaining : np.ndarray
        Samples still to be taken among those with that prefix, int64 [G].
    tied : np.ndarray
        Samples with that prefix, int64 [G].
    """

    def __init__(self, ranking: Ranking, remaining: np.ndarray) -> None:
        self.ranking, self.remaining = ranking, remaining
        self.prefix = np.zeros(len(remaining), np.uint32)
        self.tied = np.zeros_like(remaining)

    def descend(self, table: np.ndarray, step: int) -> None:
        """Settle the next `step` bits.

        `table` [G, 2^step] counts the samples with the prefix by their next bits. The search first
        finds the run of cells that contains the boundary, then the cell in it, to avoid adding up
        all cells.
        """
        runs = table.reshape(len(table), 1 << step // 2, -1)
        run, self.remaining, _ = _boundary_cell(runs.sum(axis=2), self.remaining)
        cell, self.remaining, self.tied = _boundary_cell(
            runs[np.arange(len(runs)), run], self.remaining
        )
        self.prefix = self.prefix << np.uint32(step) | (run * runs.shape[2] + cell).astype(
            np.uint32
        )


def _boundary_cell(
    counts: np.ndarray, remaining: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the cell of each row of `counts` [G, n] in which `remaining` [G] samples are reached.

    Cells are counted from the last one, which has the highest keys. If the samples are not reached,
    the result is the first cell.

    Returns
    -------
    cell, remaining, count : np.ndarray
        The cell, the samples still to be taken in it, and the samples in it, [G] each.
    """
    from_top, rows = np.cumsum(counts[:, ::-1], axis=1), np.arange(len(counts))
    steps = np.minimum((from_top < remaining[:, None]).sum(axis=1), counts.shape[1] - 1)
    cell = counts.shape[1] - 1 - steps
    count = counts[rows, cell]
    return cell, remaining - (from_top[rows, steps] - count), count


def _count_first(
    chunks: Chunks, with_ids: bool, rankings: dict[int, Ranking], bits: int
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Count samples per ranking by group and leading bits of the key.

    Returns
    -------
    tables : dict[int, np.ndarray]
        By id of the ranking, int64 [G, 2^bits].
    reserved : dict[int, np.ndarray]
        Samples with RESERVED_KEY, by id of the ranking, int64 [G].
    """
    tables = {
        which: np.zeros((ranking.groups, 1 << bits), np.int64)
        for which, ranking in rankings.items()
    }
    reserved = {which: np.zeros(ranking.groups, np.int64) for which, ranking in rankings.items()}
    for chunk in chunks(with_ids):
        for which, ranking in rankings.items():
            key, group = ranking.rank(chunk)
            if group.min(initial=0) < 0:
                key, group = key[group >= 0], group[group >= 0]
            np.add.at(tables[which].reshape(-1), (group << bits) + (key >> np.uint32(32 - bits)), 1)
            np.add.at(reserved[which], group[key == RESERVED_KEY], 1)
    return tables, reserved


def _count_next(
    chunks: Chunks, with_ids: bool, searches: list[_BoundarySearch], settled: int, step: int
) -> list[np.ndarray]:
    """Count samples whose first `settled` bits are their group's prefix, by their next bits.

    Returns int64 [G, 2^step] per search.
    """
    tables = [np.zeros((len(search.prefix), 1 << step), np.int64) for search in searches]
    for chunk in chunks(with_ids):
        for search, table in zip(searches, tables, strict=True):
            key, group = search.ranking.rank(chunk)
            hit = np.flatnonzero(
                (key >> np.uint32(32 - settled) == search.prefix[group]) & (group >= 0)
            )
            following = (key[hit] >> np.uint32(32 - settled - step)) & np.uint32((1 << step) - 1)
            np.add.at(table.reshape(-1), (group[hit] << step) + following, 1)
    return tables


def _hash_limits(
    chunks: Chunks,
    searches: list[_BoundarySearch],
    thresholds: list[np.ndarray],
    contested: list[np.ndarray],
) -> list[np.ndarray]:
    """Return the highest hash to take among the samples at each threshold.

    Where not all samples at the threshold fit (`contested`, bool [G] per search), that is the
    `remaining`-th lowest of their hashes, elsewhere `ANY_HASH`. Returns uint64 [G + 1] per search.
    """
    limits = [np.full(len(threshold), ANY_HASH) for threshold in thresholds]
    if not any(groups.any() for groups in contested):
        return limits
    hashes = _tied_hashes(chunks, searches, thresholds, contested)
    for search, threshold, groups, limit in zip(
        searches, thresholds, contested, limits, strict=True
    ):
        for group in np.flatnonzero(groups).tolist():
            tied = np.frombuffer(
                hashes[id(search.ranking), group, int(threshold[group])], np.uint64
            )
            last = int(search.remaining[group]) - 1
            if last >= len(tied):
                raise StageError(
                    "the scores changed while the keep-lists were being written; run it again"
                )
            limit[group] = np.partition(tied, last)[last]
    return limits


def _tied_hashes(
    chunks: Chunks,
    searches: list[_BoundarySearch],
    thresholds: list[np.ndarray],
    contested: list[np.ndarray],
) -> dict[tuple[int, int, int], array[int]]:
    """Return the hashes of the samples at contested thresholds, in one pass.

    They are keyed by id of the ranking, group and key: searches over the same ranking share them.
    """
    hashes: dict[tuple[int, int, int], array[int]] = {
        (id(search.ranking), group, int(threshold[group])): array("Q")
        for search, threshold, groups in zip(searches, thresholds, contested, strict=True)
        for group in np.flatnonzero(groups).tolist()
    }
    rankings = {id(search.ranking): search.ranking for search in searches}
    for chunk in chunks(True):
        tied = {which: np.zeros(len(chunk.score), bool) for which in rankings}
        for search, threshold, groups in zip(searches, thresholds, contested, strict=True):
            key, group = search.ranking.rank(chunk)
            tied[id(search.ranking)] |= np.append(groups, False)[group] & (key == threshold[group])
        for which, ranking in rankings.items():
            key, group = ranking.rank(chunk)
            positions = np.flatnonzero(tied[which])
            names = ids_at(chunk.sample_id, positions)
            for position, name in zip(positions.tolist(), names, strict=True):
                hashes[which, int(group[position]), int(key[position])].append(id_hash(name))
    return hashes
