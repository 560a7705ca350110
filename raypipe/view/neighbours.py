"""The samples whose embeddings are most similar to that of another, by the proxy 0."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass

import numpy as np

from raypipe import storage
from raypipe.report.embeddings import spread
from raypipe.runs.score_stream import read_embedding_columns
from raypipe.view.samples import Samples

SEARCHED_BYTES = 1 << 30
"""Embeddings that are searched: those of whole fragments, evenly spread over a larger source."""
BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Neighbours:
    """Rows and cosine similarities of the nearest samples and the nearest measured ones."""

    nearest: list[tuple[int, float]]
    measured: list[tuple[int, float]]
    searched: int


class NeighbourSearch:
    """Searches embeddings, which it copies to a temporary file at the first search.

    The file is mapped into memory, so it does not count towards the memory of the process.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples, self._lock = samples, threading.Lock()
        self._unit: np.ndarray | None = None
        self._rows = np.zeros(0, np.int64)

    def of(self, row: int, count: int) -> Neighbours | None:
        """Return the `count` nearest samples of each kind; None without a usable embedding."""
        query = self._embedding(row)
        if query is None:
            return None
        with self._lock:
            if self._unit is None:
                self._copy(len(query))
        unit = self._unit
        assert unit is not None
        similarity = np.empty(len(unit), np.float32)
        for start in range(0, len(unit), BLOCK_ROWS):
            similarity[start : start + BLOCK_ROWS] = unit[start : start + BLOCK_ROWS] @ query
        similarity[self._rows == row] = -np.inf
        measured = np.where(self._samples.measured[self._rows], similarity, -np.inf)
        return Neighbours(self._best(similarity, count), self._best(measured, count), len(unit))

    def _best(self, similarity: np.ndarray, count: int) -> list[tuple[int, float]]:
        count = min(count, len(similarity))
        best = np.argpartition(-similarity, count - 1)[:count] if count else np.zeros(0, np.int64)
        best = best[np.argsort(-similarity[best], kind="stable")]
        best = best[np.isfinite(similarity[best])]
        return list(zip(self._rows[best].tolist(), similarity[best].tolist(), strict=True))

    def _embedding(self, row: int) -> np.ndarray | None:
        shard = self._samples.ids.shard_of(row)
        vectors = self._read(self._samples.shards[shard])
        unit = _normalised(vectors[row - int(self._samples.ids.starts[shard])][None])[0]
        return unit if unit.any() else None

    def _read(self, shard: str) -> np.ndarray:
        table = read_embedding_columns(self._samples.run, f"{shard}.parquet", ["embedding"])
        return storage.matrix_of(table["embedding"]).astype(np.float32)

    def _copy(self, width: int) -> None:
        """Write unit vectors of the fragments that fit to a file without a name."""
        starts = self._samples.ids.starts
        limit = max(1, SEARCHED_BYTES // (4 * width))
        numbers = list(range(len(self._samples.shards)))
        chosen = spread(numbers, max(1, len(numbers) * limit // max(len(self._samples), 1)))
        file = tempfile.TemporaryFile(prefix="raypipe-view-")  # noqa: SIM115  the map keeps it open
        rows = list[np.ndarray]()
        for shard in chosen:
            unit = _normalised(self._read(self._samples.shards[shard]))
            unit.tofile(file)
            rows.append(np.arange(starts[shard], starts[shard + 1]))
        file.flush()
        self._rows = np.concatenate(rows)
        self._unit = np.memmap(file, np.float32, "r", shape=(len(self._rows), width))


def _normalised(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1; zeros for those that are zero or not finite."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    usable = np.isfinite(length) & (length > 0)
    return np.where(usable, vectors / np.where(usable, length, 1), 0).astype(np.float32)
