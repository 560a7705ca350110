"""Hashes of a sample_id and a seed: the same on every machine and in every order of the stream."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Ids: TypeAlias = "Sequence[str] | pa.Array"
WORD_BYTES = 8
"""Bytes mixed in at a time by `hash64`."""
HASHED_AT_ONCE = 1 << 13
"""Ids hashed at a time: what is computed on the way stays in the processor's cache."""
GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd: neighbouring seeds start far apart."""
ALL_ONES = np.uint64(2**64 - 1)
ORDER_SEED = 0x6F72646572
"""Seed of the canonical order, unlike any that a user sets: no draw may follow the order."""
HASH_CACHE_SIZE = 1 << 17
"""Hashes cached by `id_hash`: every keep-list asks for those of the same ties in each chunk."""


@functools.lru_cache(maxsize=HASH_CACHE_SIZE)
def id_hash(sample_id: str) -> int:
    """Return a 64-bit number that depends only on the sample_id."""
    return int.from_bytes(
        hashlib.blake2b(sample_id.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def ids_at(ids: Ids, positions: np.ndarray) -> list[str]:
    """Return the ids at the given positions."""
    if isinstance(ids, pa.Array):
        return ids.take(pa.array(positions)).to_pylist()
    return [ids[position] for position in positions.tolist()]


def string_array(ids: Ids) -> pa.Array:
    """Return ids as one Arrow array of strings."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if not isinstance(ids, pa.Array):
        return pa.array(ids, pa.string())
    return ids if ids.type == pa.string() else ids.cast(pa.string())


def hash64(ids: Ids, seed: int = 0) -> np.ndarray:
    """Return a 64-bit hash of each id and the seed, uint64 [n], for all ids at once.

    Words of 8 bytes (little-endian, the last one padded with zeros) of the UTF-8 encoding are
    mixed in one after the other, then the length, each time with the finalizer of SplitMix64
    (Steele et al. 2014). The hash is not cryptographic: whoever chooses ids can choose hashes.
    """
    array = string_array(ids)
    hashes = np.empty(len(array), np.uint64)
    if not len(array):
        return hashes
    offsets = np.frombuffer(
        array.buffers()[1], np.int32, count=len(array) + 1, offset=4 * array.offset
    )
    text = array.buffers()[2]  # None if there is no text at all
    stored = np.zeros(0, np.uint8) if text is None else np.frombuffer(text, np.uint8)
    for row in range(0, len(array), HASHED_AT_ONCE):
        ends = offsets[row : row + HASHED_AT_ONCE + 1].astype(np.int64)
        first, last = int(ends[0]), int(ends[-1])
        data = np.zeros(last - first + WORD_BYTES, np.uint8)
        data[: last - first] = stored[first:last]
        # the word that starts at each byte
        words: np.ndarray = np.ndarray((last - first + 1,), "<u8", data, strides=(1,))
        hashes[row : row + HASHED_AT_ONCE] = _hash_words(
            words, ends[:-1] - first, np.diff(ends), seed
        )
    return hashes


def _hash_words(words: np.ndarray, start: np.ndarray, length: np.ndarray, seed: int) -> np.ndarray:
    """Return the hashes of the ids that start at these words and have these lengths in bytes."""
    state = np.full(len(start), _mix(np.array([(seed * GOLDEN + 1) % 2**64], np.uint64))[0])
    longest, shortest = int(length.max()), int(length.min())
    for position in range(0, longest, WORD_BYTES):
        if shortest >= position + WORD_BYTES:
            state = _mix(state ^ words[start + position])
            continue
        left = length - position
        rows: Any = slice(None) if shortest > position else np.flatnonzero(left > 0)
        unused = (8 * np.maximum(WORD_BYTES - left[rows], 0)).astype(np.uint64)
        state[rows] = _mix(state[rows] ^ (words[start[rows] + position] & (ALL_ONES >> unused)))
    return _mix(state ^ length.astype(np.uint64))


def mix_hashes(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Return other hashes, which depend on given ones and a seed, uint64 [n]."""
    return _mix(hashes ^ _mix(np.array([(seed * GOLDEN + 1) % 2**64], np.uint64)))


def _mix(state: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 [n] (finalizer of SplitMix64)."""
    mixed = state >> np.uint64(30)
    mixed ^= state
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    shifted = mixed >> np.uint64(27)
    mixed ^= shifted
    mixed *= np.uint64(0x94D049BB133111EB)
    np.right_shift(mixed, np.uint64(31), out=shifted)
    mixed ^= shifted
    return mixed


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Map uint64 [n] to float64 [n] strictly between 0 and 1."""
    return ((hashes >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def canonical_hashes(ids: Ids) -> np.ndarray:
    """Return the hashes that the canonical order of samples sorts by, uint64 [n]."""
    return hash64(ids, ORDER_SEED)


def canonical_order(ids: Ids) -> np.ndarray:
    """Return the rows of some samples in the canonical order, int64 [n].

    The order is pseudo-random and depends on nothing but the ids: not on the rows, the files or the
    format that they come from. Sums over samples and draws by row number use it, so that the same
    samples give the same result, bit for bit.
    """
    hashes = canonical_hashes(ids)
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    if (ordered[1:] == ordered[:-1]).any():
        names = string_array(ids).to_pylist()
        order = np.array(sorted(order.tolist(), key=lambda row: (hashes[row], names[row])))
    return order


def hash_range(hashes: np.ndarray, ranges: int) -> np.ndarray:
    """Return which of equal ranges of hashes each one lies in, int64 [n], ascending with the hash.

    `ranges` must be less than 2^32.
    """
    high = hashes >> np.uint64(32)
    return ((high * np.uint64(ranges)) >> np.uint64(32)).astype(np.int64)


def with_order(table: pa.Table, fragment: str, seed: int) -> pa.Table:
    """Return samples of a fragment with the columns `order`, for `lowest`, and `fragment`."""
    order = hash64(table["sample_id"].combine_chunks(), seed)
    table = table.append_column("order", pa.array(order))
    return table.append_column("fragment", pa.array([fragment] * len(order), pa.string()))


def lowest(tables: Sequence[pa.Table], count: int) -> pa.Table:
    """Return the `count` rows of lowest order of all tables, ascending, one row per id.

    `order` is a column of hashes. So the rows are a random draw, and the lowest of two draws are a
    draw from both sets together.
    """
    filled = [table for table in tables if len(table)]
    if not filled:
        return pa.table({})
    table = pa.concat_tables(filled).sort_by([("order", "ascending"), ("sample_id", "ascending")])
    ids = table["sample_id"].combine_chunks()
    first = np.ones(len(ids), bool)
    first[1:] = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(
        zero_copy_only=False
    )
    return table.filter(pa.array(first)).slice(0, count).combine_chunks()


class IdSet:
    """A set of ids for lookups, which records which of its ids were found.

    Memory: the ids, and 8 bytes per id.

    Attributes
    ----------
    ids : pa.Array
        The unique ids.
    met : np.ndarray
        Whether `find` has found each of them, bool [len(ids)].
    """

    def __init__(self, ids: Ids) -> None:
        unique = string_array(ids).drop_null().unique()
        hashes = hash64(unique)
        order = np.argsort(hashes, kind="stable")
        self.ids, self._hashes = unique.take(pa.array(order)), hashes[order]
        self.met = np.zeros(len(order), bool)

    def find(self, ids: Ids) -> np.ndarray:
        """Return the positions in `ids` of the ids that are in the set, int64."""
        if not len(self.ids) or not len(ids):
            return np.zeros(0, np.int64)
        array, hashes = string_array(ids), hash64(ids)
        slot = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[slot] == hashes)
        same = pc.equal(array.take(pa.array(hits)), self.ids.take(pa.array(slot[hits]))).to_numpy(
            zero_copy_only=False
        )
        self.met[slot[hits[same]]] = True
        return hits[same]


def hash_ids(ids: pa.Array) -> np.ndarray:
    """Return unseeded 64-bit BLAKE2b hashes of the ids that are not null, uint64 [n]."""
    digests = b"".join(
        hashlib.blake2b(sample_id.encode(), digest_size=8).digest()
        for sample_id in ids.drop_null().to_pylist()
    )
    return np.frombuffer(digests, "<u8")
