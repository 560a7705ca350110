"""Blocks of samples with embeddings: what strategies that compare samples see at a time.

A block is a class, or the whole stream if classes do not matter. More than `BLOCK_SAMPLES` samples
are divided into blocks of about equal size by a hash of the id. Each of these is a random draw from
the class, and the strategy is applied to each of them, as in the first round of GreeDi
(Mirzasoleiman et al., NeurIPS 2013) and in the partitions of InfoMax. So memory does not grow with
the stream, and time does not grow with the square of a class. Two samples in different blocks are
not compared.

With cross-fitting, strategies that weigh the scores of neighbours against each other get blocks of
one part each. Proxies of other parts were trained on a seed sample, so they score its neighbours in
their parts as samples that they know; a sample outside the seed set has no such neighbours. Within
a part, no score depends on which of the samples are in the seed set.

Within a block the samples are in an order that depends on their ids alone. So does everything
computed from them: the order of the stream does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raypipe.errors import ConfigError
from raypipe.selection.base import Parts, SelectionOptions
from raypipe.selection.hashing import ORDER_SEED, hash64, hash_range, string_array
from raypipe.selection.radix_select import (
    Chunk,
    Ranking,
    ValidatedStream,
    class_groups,
    order_key,
)

BLOCK_SAMPLES = 1 << 16
"""Maximum average number of samples in a block."""
HELD_BYTES = 1 << 29
"""Embeddings held at a time, twice while they are joined. When there are more, the stream is read
several times."""
BLOCK_SEED = 0x626C6F636B
"""Seed of the hash that divides a class into blocks."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some samples of one class, or of all, in the order of a hash of their ids.

    Attributes
    ----------
    group : int
        Their class, or 0 if classes do not matter.
    vectors : np.ndarray
        Their embeddings, float32 [n, d].
    score : np.ndarray
        float32 [n].
    position : np.ndarray
        Their positions in the stream, int64 [n].
    stratum : np.ndarray
        For each of the rankings that were passed, the group of each sample, int64 [rankings, n];
        -1 if it is excluded.
    """

    group: int
    vectors: np.ndarray
    score: np.ndarray
    position: np.ndarray
    stratum: np.ndarray

    def take(self, rows: np.ndarray) -> Block:
        """Return some of the samples."""
        return Block(
            self.group,
            self.vectors[rows],
            self.score[rows],
            self.position[rows],
            self.stratum[:, rows],
        )


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """How the eligible samples of a stream are divided into blocks.

    Attributes
    ----------
    classes : int or None
        Number of classes; None if they do not matter.
    size : np.ndarray
        Samples per group, int64 [G].
    parts : Parts or None
        Parts that do not share a block; None if they can.
    """

    classes: int | None
    size: np.ndarray
    parts: Parts | None

    @classmethod
    def of(
        cls,
        stream: ValidatedStream,
        classes: int,
        options: SelectionOptions,
        within_parts: bool = False,
    ) -> BlockLayout:
        """Count the samples in one pass.

        `within_parts`: whether samples are compared with those of their part alone.
        """
        within = classes if options.by_class else None
        size = np.zeros(1 if within is None else classes + 1, np.int64)
        for chunk in stream(False):
            group = cls._group(chunk, within)[chunk.eligible()]
            size += np.bincount(group, minlength=len(size))
        return cls(within, size, options.parts if within_parts else None)

    @property
    def part_count(self) -> int:
        """Number of parts that do not share a block."""
        return self.parts.count if self.parts else 1

    @cached_property
    def per_part(self) -> np.ndarray:
        """Blocks of each group in one part, int64 [G]."""
        return np.maximum(1, -(-self.size // (self.part_count * BLOCK_SAMPLES)))

    @property
    def per_group(self) -> np.ndarray:
        """Blocks of each group, int64 [G]."""
        return self.per_part * self.part_count

    @staticmethod
    def _group(chunk: Chunk, classes: int | None) -> np.ndarray:
        if classes is None:
            return np.zeros(len(chunk.score), np.int64)
        return class_groups(chunk.label, classes)

    def block_of(self, chunk: Chunk) -> np.ndarray:
        """Return the block of each sample of a chunk with ids, int64 [n]; -1 if not eligible."""
        group = self._group(chunk, self.classes)
        block = (np.cumsum(self.per_group) - self.per_group)[group]
        if self.parts:
            block += self.parts.of(string_array(chunk.sample_id).to_pylist()) * self.per_part[group]
        divided = np.flatnonzero(self.per_part > 1).tolist()
        hashes = hash64(chunk.sample_id, BLOCK_SEED) if divided else np.zeros(0, np.uint64)
        for one in divided:
            rows = np.flatnonzero(group == one)
            block[rows] += hash_range(hashes[rows], int(self.per_part[one]))
        return np.where(chunk.eligible(), block, -1)

    def group_of(self, block: int) -> int:
        """Return the group that a block belongs to."""
        return int(np.searchsorted(np.cumsum(self.per_group), block, side="right"))

    def batches(self, sample_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of blocks whose embeddings fit into `HELD_BYTES`, or of one block."""
        sizes = np.repeat(self.size / self.per_group, self.per_group) * sample_bytes
        low, held = 0, 0.0
        for high, size in enumerate(sizes.tolist()):
            if held and held + size > HELD_BYTES:
                yield low, high
                low, held = high, 0.0
            held += size
        yield low, len(sizes)


def read_blocks(
    stream: ValidatedStream, layout: BlockLayout, rankings: Sequence[Ranking]
) -> Iterator[Block]:
    """Yield the blocks that have samples.

    Parameters
    ----------
    stream
        The stream, with embeddings.
    layout
        How it is divided.
    rankings
        What fills `Block.stratum`.

    Notes
    -----
    One pass over the embeddings for every `HELD_BYTES` of them. Memory: that, and one block.
    """
    sample_bytes = 4
    for _, vectors in stream.embedded():
        sample_bytes = vectors.shape[1] * vectors.dtype.itemsize
        break
    for low, high in layout.batches(sample_bytes):
        yield from _read_batch(stream, layout, rankings, low, high)


def _read_batch(
    stream: ValidatedStream, layout: BlockLayout, rankings: Sequence[Ranking], low: int, high: int
) -> Iterator[Block]:
    """Yield the blocks from `low` to `high`, exclusive."""
    parts: list[tuple[np.ndarray, ...]] = []
    for chunk, vectors in stream.embedded():
        block = layout.block_of(chunk)
        rows = np.flatnonzero((block >= low) & (block < high))
        strata = [ranking.rank(chunk)[1][rows] for ranking in rankings]
        parts.append(
            (
                block[rows],
                hash64(chunk.sample_id, ORDER_SEED)[rows],
                position_of(chunk) + rows,
                chunk.score[rows],
                np.stack(strata, 1) if strata else np.zeros((len(rows), 0), np.int64),
                vectors[rows],
            )
        )
    if not parts:
        return
    block, hashes, position, score, stratum, vectors = (
        np.concatenate([part[column] for part in parts]) for column in range(6)
    )
    order = np.lexsort((hashes, block))
    starts = np.flatnonzero(np.diff(block[order], prepend=-1)).tolist()
    for start, stop in itertools.pairwise([*starts, len(order)]):
        rows = order[start:stop]
        yield Block(
            layout.group_of(int(block[rows[0]])),
            vectors[rows].astype(np.float32),
            score[rows],
            position[rows],
            stratum[rows].T,
        )


def position_of(chunk: Chunk) -> int:
    """Return `Chunk.position`; raise ConfigError if the stream has none."""
    if chunk.position is None:
        raise ConfigError(
            "this strategy needs the position of each chunk in the stream, and the stream has none"
        )
    return chunk.position


class ByPosition(Ranking):
    """Another value of each sample, highest first; all samples form one group.

    Parameters
    ----------
    values : np.ndarray
        By position in the stream, float32 [samples].
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        start, count = position_of(chunk), len(chunk.score)
        return order_key(self._values[start : start + count]), np.zeros(count, np.int64)


class AllAlike(Ranking):
    """All samples in one group, with equal keys."""

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        count = len(chunk.score)
        return np.zeros(count, np.uint32), np.zeros(count, np.int64)


def values_by_block(
    stream: ValidatedStream,
    layout: BlockLayout,
    rankings: Sequence[Ranking],
    values_of: Callable[[Block, int], Sequence[np.ndarray]],
    lists: int = 1,
) -> list[np.ndarray]:
    """Compute values of each sample from its block, for each of some rankings.

    Parameters
    ----------
    stream, layout, rankings
        As in `read_blocks`. Samples that a ranking excludes are not in the blocks for it.
    values_of
        (samples of a block in one group of a ranking, number of the ranking) -> their values, for
        each of the lists, float [n] each.
    lists
        Number of values of each sample.

    Returns
    -------
    list[np.ndarray]
        Values by position, float32 [samples]; 0 for excluded samples. For each ranking there are
        those for all of its lists.
    """
    values = [np.zeros(stream.samples, np.float32) for _ in range(lists * len(rankings))]
    for block in read_blocks(stream, layout, rankings):
        for number, stratum in enumerate(block.stratum):
            for which in np.unique(stratum[stratum >= 0]).tolist():
                part = block.take(np.flatnonzero(stratum == which))
                for which_list, value in enumerate(values_of(part, number)):
                    values[lists * number + which_list][part.position] = value
    return values


def values_of_order(order: np.ndarray) -> np.ndarray:
    """Return values that sort n samples into an order, float64 [n].

    They fall in equal steps from almost 1 to almost 0, so that blocks of a class that are cut at
    the same value give the same share of their samples.

    Parameters
    ----------
    order : np.ndarray
        Row of each sample, the first one first, int64 [n].
    """
    values = np.empty(len(order))
    values[order] = 1 - (np.arange(len(order)) + 0.5) / max(1, len(order))
    return values
