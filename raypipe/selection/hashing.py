"""Numbers that depend on nothing but a sample_id and a seed: the same on every machine and in every order of the stream."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Ids: TypeAlias = "Sequence[str] | pa.Array"
WORD = 8
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: seeds that are neighbours start far apart
FULL = np.uint64(2**64 - 1)
REMEMBERED = 1 << 17
"""Hashes that are not computed again: every list asks for those of the ties in one chunk after the other."""


@functools.lru_cache(maxsize=REMEMBERED)
def id_hash(sample_id: str) -> int:
    """A number below 2^64 that depends on nothing but the sample_id."""
    return int.from_bytes(
        hashlib.blake2b(sample_id.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def names_at(ids: Ids, positions: np.ndarray) -> list[str]:
    """The ids at some positions."""
    if isinstance(ids, pa.Array):
        return ids.take(pa.array(positions)).to_pylist()
    return [ids[position] for position in positions.tolist()]


def text_array(ids: Ids) -> pa.Array:
    """Ids as one Arrow array of strings."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if not isinstance(ids, pa.Array):
        return pa.array(ids, pa.string())
    return ids if ids.type == pa.string() else ids.cast(pa.string())


def hash64(ids: Ids, seed: int = 0) -> np.ndarray:
    """uint64 [n]: a hash of the UTF-8 bytes of each id and the seed, all ids at once.

    Words of 8 bytes (little-endian, the last one filled with zeros) are mixed in one after the other, then the length, each
    time by the finalizer of SplitMix64 (Steele et al. 2014). It is not cryptographic: who chooses ids can choose hashes.
    """
    array = text_array(ids)
    state = np.repeat(_mix(np.array([(seed * GOLDEN + 1) % 2**64], np.uint64)), len(array))
    if not len(array):
        return state
    offsets = np.frombuffer(
        array.buffers()[1], np.int32, count=len(array) + 1, offset=4 * array.offset
    )
    start, length = offsets[:-1].astype(np.int64), np.diff(offsets)
    stored = array.buffers()[2]
    data = np.zeros(int(offsets[-1]) + WORD, np.uint8)
    data[:-WORD] = (
        np.frombuffer(stored, np.uint8, count=int(offsets[-1])) if stored is not None else 0
    )
    words: np.ndarray = np.ndarray(
        (len(data) - WORD + 1,), "<u8", data, strides=(1,)
    )  # the word that starts at each byte
    for position in range(0, int(length.max()), WORD):
        left = length - position
        rows: Any = slice(None) if int(left.min()) > 0 else np.flatnonzero(left > 0)
        unused = (8 * np.maximum(WORD - left[rows], 0)).astype(np.uint64)
        state[rows] = _mix(state[rows] ^ (words[start[rows] + position] & (FULL >> unused)))
    return _mix(state ^ length.astype(np.uint64))


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniform(hashes: np.ndarray) -> np.ndarray:
    """uint64 [n] -> float64 [n] strictly between 0 and 1."""
    return ((hashes >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


class IdSet:
    """A list of ids to look others up in; it notes which of its own were met. Memory: the list, and 8 bytes for each id."""

    def __init__(self, ids: Ids) -> None:
        unique = text_array(ids).drop_null().unique()
        hashes = hash64(unique)
        order = np.argsort(hashes, kind="stable")
        self.ids, self._hashes = unique.take(pa.array(order)), hashes[order]
        self.met = np.zeros(len(order), bool)

    def find(self, ids: Ids) -> np.ndarray:
        """Positions among `ids`, int64, of those that are in the list."""
        if not len(self.ids) or not len(ids):
            return np.zeros(0, np.int64)
        array, hashes = text_array(ids), hash64(ids)
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[place] == hashes)
        same = pc.equal(array.take(pa.array(hits)), self.ids.take(pa.array(place[hits]))).to_numpy(
            zero_copy_only=False
        )
        self.met[place[hits[same]]] = True
        return hits[same]


def hash_ids(ids: pa.Array) -> np.ndarray:
    """64-bit hashes, uint64 [n], of the ids that are not null."""
    digests = b"".join(
        hashlib.blake2b(sample_id.encode(), digest_size=8).digest()
        for sample_id in ids.drop_null().to_pylist()
    )
    return np.frombuffer(digests, "<u8")
