"""Exact nearest neighbours among embeddings (Euclidean), by FAISS."""

from __future__ import annotations

import numpy as np
import torch  # before faiss: each brings an OpenMP library, and this order is the one that works everywhere

import faiss  # isort: skip

from raypipe.errors import RaypipeError

SLACK = 8
"""Candidates asked of FAISS beyond k. FAISS computes |a|^2 + |b|^2 - 2ab, which rounds; distances are then computed anew."""
CHUNK_VALUES = 1 << 24
"""Most float32 values held at once while distances are computed anew (64 MiB)."""


class NeighbourIndex:
    """Finds the nearest of a fixed set of vectors, exactly. Memory: the vectors."""

    def __init__(self, vectors: np.ndarray) -> None:
        """Index float32 [n, d]. Raises RaypipeError when there is nothing to index or a value is not finite."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or not vectors.size:
            raise RaypipeError(f"embeddings of shape {list(vectors.shape)} cannot be searched for neighbours")
        _check_finite(vectors)
        self._index = faiss.IndexFlatL2(vectors.shape[1])
        self._index.add(vectors)
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Length d of a vector."""
        return self.vectors.shape[1]

    def to_bytes(self) -> np.ndarray:
        """The index in FAISS's own format, uint8 [bytes]."""
        return faiss.serialize_index(self._index)

    @classmethod
    def from_bytes(cls, data: np.ndarray) -> NeighbourIndex:
        """Restore what `to_bytes` gave. Raises RaypipeError when it is something else."""
        try:
            whole = faiss.deserialize_index(np.ascontiguousarray(data, dtype=np.uint8))  # owns what the line below points to
            index = faiss.downcast_index(whole)
            if not isinstance(index, faiss.IndexFlatL2 | faiss.IndexFlat) or index.metric_type != faiss.METRIC_L2:
                raise RaypipeError(
                    f"the neighbour index is a {type(index).__name__}, expected IndexFlatL2; fit the extrapolator again"
                )
            vectors = index.reconstruct_n(0, index.ntotal)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RaypipeError(f"the neighbour index is damaged ({reason}); fit the extrapolator again") from None
        return cls(vectors)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Distance float32 [m, k] and row int64 [m, k] of the nearest vectors, nearest first, equal ones by row.

        k is cut to the number of vectors there are. `exclude`, int64 [m], names one row for each query that is never its
        neighbour (a scored sample itself, even when others have the same embedding); k is then at most n - 1.
        Raises RaypipeError when a query is not finite or of another width.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise RaypipeError(f"embeddings of shape {list(queries.shape)} do not fit neighbours of width {self.width}")
        _check_finite(queries)
        k = min(k, len(self) - (exclude is not None))
        wanted = min(k + SLACK, len(self))
        distance, row = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        if k == 0:
            return distance, row
        faiss.omp_set_num_threads(torch.get_num_threads())
        step = max(1, CHUNK_VALUES // (wanted * self.width))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            _, found = self._index.search(queries[part], wanted)
            found.sort(axis=1)
            away = np.linalg.norm(self.vectors[found] - queries[part, None], axis=2)
            if exclude is not None:
                away[found == np.asarray(exclude)[part, None]] = np.inf
            order = away.argsort(axis=1, kind="stable")[:, :k]
            distance[part] = np.take_along_axis(away, order, 1)
            row[part] = np.take_along_axis(found, order, 1)
        return distance, row


class ClassNeighbours:
    """Finds the nearest vectors of a sample's own class, exactly. Memory: the labelled vectors once more."""

    def __init__(self, vectors: np.ndarray, label: np.ndarray) -> None:
        """Index float32 [n, d] by class, int64 [n]; -1, no label, belongs to none. Raises RaypipeError as `NeighbourIndex`."""
        self._rows = {int(y): np.flatnonzero(label == y) for y in np.unique(label[label >= 0])}
        self._parts = {y: NeighbourIndex(vectors[rows]) for y, rows in self._rows.items()}

    def search(
        self, queries: np.ndarray, label: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distance float32 [m, k] and row int64 [m, k] of the nearest of the same class, nearest first.

        Where a class has fewer than k, or a query no label, places are left over: distance infinite, row -1. `exclude`, int64
        [m], names one row for each query that is never its neighbour, of the query's class (a scored sample itself).
        """
        distance, row = np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        for y in np.unique(label):
            if int(y) not in self._parts:
                continue
            rows, mine = self._rows[int(y)], np.flatnonzero(label == y)
            own = np.searchsorted(rows, exclude[mine]) if exclude is not None else None
            away, near = self._parts[int(y)].search(queries[mine], k, own)
            distance[mine, : away.shape[1]], row[mine, : near.shape[1]] = away, rows[near]
        return distance, row


def _check_finite(vectors: np.ndarray) -> None:
    bad = int((~np.isfinite(vectors).all(1)).sum())
    if bad:
        raise RaypipeError(f"{bad} of {len(vectors)} embeddings have values that are not finite; leave these samples out")
