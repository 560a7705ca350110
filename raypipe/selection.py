"""Keep-list strategies: exactly the best `round(keep * N)` samples, from a stream too long to sort or to hold.

A float32 score becomes a uint32 key with the same order. A few passes over the stream count how many samples share the
leading bits of the key (a radix histogram), and so pin down, bit by bit, the key at which the keep-list ends. Memory depends on
the number of groups and keep fractions, never on the number of samples; only where several samples share that last
key and not all of them fit are 8 bytes for each of these held.

Samples with equal scores are taken in the order of a hash of their sample_id: the same ones on every machine and in
every order of the stream.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raypipe.errors import ConfigError, StageError

CELLS = 1 << 24
"""Most counters held at a time (8 bytes each, twice); with very many classes fewer bits are settled in one pass."""
EVERY = np.uint64(2**64 - 1)
NOTHING = np.uint32(2**32 - 1)  # above the key of every finite score


class Chunk(NamedTuple):
    """A part of the stream: score float32 [n], label int32 [n] with -1 for unlabelled, n sample_ids (none unless asked for)."""

    score: np.ndarray
    label: np.ndarray
    sample_id: Sequence[str]


Chunks = Callable[[bool], Iterable[Chunk]]
"""Starts the stream anew: the same samples each time; the argument says whether sample_ids are needed."""


@dataclass(frozen=True)
class Strategy:
    """How many samples to keep of each group.

    by_class  groups are the classes, with the unlabelled as one more; else all samples are one group
    quotas    (samples per group [G], samples to keep) -> samples to keep per group [G], which sum to the latter
    """

    by_class: bool
    quotas: Callable[[np.ndarray, int], np.ndarray]


def in_proportion(counts: np.ndarray, total: int) -> np.ndarray:
    """The same share of each group, by largest remainder (Hamilton's method), in whole numbers throughout.

    Equal remainders go to the smaller group, then to the lower index. Returns int64 [G] with sum `total`.
    """
    everything = int(counts.sum())
    if everything == 0:
        return np.zeros(len(counts), np.int64)
    exact = [divmod(total * int(count), everything) for count in counts]
    quotas = np.array([whole for whole, _ in exact], np.int64)
    order = sorted(range(len(counts)), key=lambda group: (-exact[group][1], int(counts[group]), group))
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas


STRATEGIES: dict[str, Strategy] = {
    "top": Strategy(by_class=False, quotas=lambda counts, total: np.full(1, total, np.int64)),
    "balanced": Strategy(by_class=True, quotas=in_proportion),
}
"""Every strategy of `select.strategy`. With top, the list of a smaller keep fraction lies inside that of a larger one."""


@dataclass(frozen=True)
class Cut:
    """What a keep-list takes: per group [G] every score above a threshold, and of the ties there the lowest hashes.

    fraction   the keep fraction it was made for
    quota      int64 [G], samples kept
    threshold  uint32 [G], key of the last score kept
    limit      uint64 [G], the highest hash kept among samples with that score
    """

    fraction: float
    by_class: bool
    quota: np.ndarray
    threshold: np.ndarray
    limit: np.ndarray

    @property
    def count(self) -> int:
        """Samples kept."""
        return int(self.quota.sum())

    def mask(self, chunk: Chunk) -> np.ndarray:
        """Which samples of a chunk (with sample_ids) are kept: bool [n]."""
        key, group = order_key(chunk.score), _groups(chunk.label, self.by_class, len(self.quota))
        threshold = self.threshold[group]
        kept = key > threshold
        tied = np.flatnonzero(key == threshold)
        limit = self.limit[group[tied]]
        kept[tied] = limit == EVERY
        for position, highest in zip(tied[limit != EVERY].tolist(), limit[limit != EVERY].tolist(), strict=True):
            kept[position] = id_hash(chunk.sample_id[position]) <= highest
        return kept


def select(chunks: Chunks, keep: Sequence[float], strategy: str = "top", classes: int = 0) -> list[Cut]:
    """One cut for each keep fraction, in the order given; each keeps exactly round(fraction * N) of the N samples.

    `classes` is the number of classes (labels are below it); only strategies that look at the class need it.
    Raises ConfigError for an unknown strategy or a fraction outside (0, 1], StageError for a score that is not finite.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: {strategy!r} is not one of {', '.join(STRATEGIES)}")
    for fraction in keep:
        if not 0 < fraction <= 1:
            raise ConfigError(f"keep: {fraction!r} is not a fraction of the samples: it must be above 0 and at most 1")
    by_class, groups = STRATEGIES[strategy].by_class, classes + 1 if STRATEGIES[strategy].by_class else 1
    bits = max(1, min(16, (CELLS // (groups * max(len(keep), 1))).bit_length() - 1))

    counted = _count_first(chunks, by_class, groups, bits)  # [G, 2^bits]
    sizes = counted.sum(axis=1)
    total = int(sizes.sum())
    quota = np.stack([STRATEGIES[strategy].quotas(sizes, round(fraction * total)) for fraction in keep])
    prefix, left = np.zeros((len(keep), groups), np.uint32), quota.copy()
    for number in range(len(keep)):
        prefix[number], left[number], tied = _descend(counted, left[number])
    ties = np.zeros_like(left)
    settled = bits
    while settled < 32:
        step = min(bits, 32 - settled)
        table = _count_next(chunks, by_class, prefix, settled, step)
        for number in range(len(keep)):
            digit, left[number], tied = _descend(table[number], left[number])
            prefix[number] = prefix[number] << np.uint32(step) | digit
            ties[number] = tied
        settled += step

    threshold = np.where(quota > 0, prefix, NOTHING)
    limit = _limits(chunks, by_class, threshold, left, contested=(quota > 0) & (left < ties))
    return [
        Cut(float(fraction), by_class, quota[number], threshold[number], limit[number]) for number, fraction in enumerate(keep)
    ]


def order_key(score: np.ndarray) -> np.ndarray:
    """float32 [n] -> uint32 [n] in the same order; 0.0 and -0.0 are equal, as they are as numbers."""
    bits = (np.asarray(score, np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def id_hash(sample_id: str) -> int:
    """A number below 2^64 that depends on nothing but the sample_id."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _groups(label: np.ndarray, by_class: bool, groups: int) -> np.ndarray:
    """int64 [n]: the class, with groups - 1 for the unlabelled; or 0 for all."""
    if not by_class:
        return np.zeros(len(label), np.int64)
    if len(label) and int(label.max()) >= groups - 1:
        raise StageError(f"label {int(label.max())} among the scores, but the source has {groups - 1} classes; score it again")
    return np.where(label < 0, groups - 1, label).astype(np.int64)


def _count_first(chunks: Chunks, by_class: bool, groups: int, bits: int) -> np.ndarray:
    """int64 [G, 2^bits]: samples by group and leading bits of the key. Raises StageError for scores that are not finite."""
    table, samples, bad, example = np.zeros((groups, 1 << bits), np.int64), 0, 0, np.nan
    for chunk in chunks(False):
        score = np.asarray(chunk.score, np.float32)
        infinite = ~np.isfinite(score)
        samples += len(score)
        if infinite.any():
            bad += int(infinite.sum())
            example = score[infinite][0]
        place = (_groups(chunk.label, by_class, groups) << bits) + (order_key(score) >> np.uint32(32 - bits))
        np.add.at(table.reshape(-1), place, 1)
    if bad:
        raise StageError(f"{bad} of {samples} scores are not finite (such as {example}), so they have no order; score them again")
    return table


def _count_next(chunks: Chunks, by_class: bool, prefix: np.ndarray, settled: int, step: int) -> np.ndarray:
    """int64 [F, G, 2^step]: of the samples whose first `settled` bits are the prefix [F, G], how many have which next bits."""
    fractions, groups = prefix.shape
    table = np.zeros((fractions, groups, 1 << step), np.int64)
    flat = table.reshape(-1)
    for chunk in chunks(False):
        key, group = order_key(chunk.score), _groups(chunk.label, by_class, groups)
        leading = key >> np.uint32(32 - settled)
        following = (key >> np.uint32(32 - settled - step)) & np.uint32((1 << step) - 1)
        for number in range(fractions):
            hit = leading == prefix[number, group]
            np.add.at(flat, ((number * groups + group[hit]) << step) + following[hit], 1)
    return table


def _descend(table: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cell in which the `left`-th highest sample of each group lies.

    table [G, cells] counts, left [G] -> cell uint32 [G], how many to take of that cell [G], how many are in it [G].
    """
    from_top = np.cumsum(table[:, ::-1], axis=1)
    steps = np.minimum((from_top < left[:, None]).sum(axis=1), table.shape[1] - 1)
    cell = table.shape[1] - 1 - steps
    rows = np.arange(len(table))
    return cell.astype(np.uint32), left - (from_top[rows, steps] - table[rows, cell]), table[rows, cell]


def _limits(chunks: Chunks, by_class: bool, threshold: np.ndarray, left: np.ndarray, contested: np.ndarray) -> np.ndarray:
    """uint64 [F, G]: the `left`-th lowest hash among the samples at the threshold, where not all of them fit."""
    limit = np.full(threshold.shape, EVERY)
    if not contested.any():
        return limit
    fractions, groups = threshold.shape
    hashes: dict[tuple[int, int], array[int]] = {
        (int(group), int(threshold[number, group])): array("Q") for number, group in zip(*np.nonzero(contested), strict=True)
    }
    for chunk in chunks(True):
        key, group = order_key(chunk.score), _groups(chunk.label, by_class, groups)
        tied = np.zeros(len(key), bool)
        for number in range(fractions):
            tied |= contested[number, group] & (key == threshold[number, group])
        for position in np.flatnonzero(tied).tolist():
            hashes[int(group[position]), int(key[position])].append(id_hash(chunk.sample_id[position]))
    for number, which in zip(*np.nonzero(contested), strict=True):
        known = np.frombuffer(hashes[int(which), int(threshold[number, which])], np.uint64)
        last = int(left[number, which]) - 1
        if last >= len(known):
            raise StageError("the scores changed while the keep-lists were being made; run it again")
        limit[number, which] = np.partition(known, last)[last]
    return limit
