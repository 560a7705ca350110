"""Nearest neighbours among embeddings (Euclidean), by FAISS: exact up to a number of vectors, from inverted lists beyond it.

Inverted lists (Jégou et al. 2011, "Product Quantization for Nearest Neighbor Search", section IV, with whole vectors instead of
codes): k-means divides n vectors into about 2 sqrt(n) lists, one a centroid; a query reads the lists of the centroids nearest to
it, as many as `effort` says, and not the others. What it misses there is measured when the index is built, on vectors that are
searched among the others: the effort is doubled until the recall is 0.95, and where that would take a quarter of the lists the
search is exact after all, since then it is faster too.

On a GPU an exact search is a matrix product and the least of its rows; distances to what it finds are computed as elsewhere, so that
the neighbours are those that a CPU finds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch  # before faiss: each brings an OpenMP library, and this order is the one that works everywhere

import faiss  # isort: skip
from raypipe.errors import RaypipeError
from raypipe.vision.devices import AdaptiveBatch, to_device
from raypipe.vision.precision import computing

SLACK = 8
"""Candidates asked for beyond k: |a|^2 + |b|^2 - 2ab, of which they are the least, rounds; distances are then computed anew."""
QUERIES = 4096
"""Most queries looked up at once."""
PRODUCT_VALUES = 1 << 28
"""Most float32 values of a product on a GPU (1 GiB)."""
CHUNK_VALUES = 1 << 20
"""Most float32 values held at once while distances are computed anew (4 MiB: more would leave the cache)."""
LEAST_RECALL = 0.95
RECALL_ROWS = 1000
"""Vectors that the recall is measured on."""
LISTS = 2.0
"""Lists, in square roots of the number of vectors."""
FIRST_EFFORT = 8
MOST_OF_LISTS = 4
"""A search that reads more than one in so many lists is not worth them."""
POINTS_PER_LIST, ROUNDS = 64, 10
"""Of k-means: most vectors it takes for each centroid, and its iterations."""
TENSORS = ("centroid", "list", "tried")

Candidates = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class SearchQuality:
    """How an index is searched, and how much it finds.

    vectors  how many are searched
    lists    inverted lists; 0: the search is exact
    tried    lists read for a query and the recall that gave, in the order tried; the last holds, if there are lists
    k        neighbours that recall is about
    """

    vectors: int
    lists: int = 0
    tried: tuple[tuple[int, float], ...] = ()
    k: int = 0

    @property
    def recall(self) -> float:
        """Share of the k nearest that a search finds."""
        return self.tried[-1][1] if self.lists else 1.0

    @property
    def effort(self) -> int:
        """Lists read for a query; 0 where the search is exact."""
        return self.tried[-1][0] if self.lists else 0

    @property
    def note(self) -> str:
        """What there is to say: that the effort was raised, or that lists are of no use; else empty."""
        if len(self.tried) < 2 and (self.lists or not self.tried):
            return ""
        (first, before), (last, after) = self.tried[0], self.tried[-1]
        if self.lists:
            found = f"search effort raised from {first} to {last} of {self.lists} lists, recall {before:.3f} to {after:.3f}"
        else:
            found = f"inverted lists give a recall of {after:.3f} with {last} of them read, so the search is exact and slower"
        return f"neighbours among {self.vectors:,} samples: {found}"

    def as_dict(self) -> dict[str, Any]:
        """Itself as JSON."""
        return {
            "kind": "ivf" if self.lists else "exact",
            "vectors": self.vectors,
            "lists": self.lists,
            "effort": self.effort,
            "recall": self.recall,
            "k": self.k,
            "tried": [{"effort": effort, "recall": recall} for effort, recall in self.tried],
            "note": self.note,
        }


class NeighbourIndex:
    """Finds the nearest of a fixed set of vectors. Memory: the vectors, and once more where there are lists.

    device  where an exact search looks for them: cpu, or cuda; lists are searched by the CPU. May be set at any time
    """

    device = "cpu"

    def __init__(self, vectors: np.ndarray, exact: int | None = None, k: int = 20) -> None:
        """Index float32 [n, d]; for n above `exact` by lists, with a recall that is measured for k neighbours.

        The same vectors, `exact`, k and number of torch threads give the same index. Raises RaypipeError when there is nothing to
        index or a value is not finite.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or not vectors.size:
            raise RaypipeError(
                f"embeddings of shape {list(vectors.shape)} cannot be searched for neighbours"
            )
        _check_finite(vectors)
        self.vectors = vectors
        self.quality = SearchQuality(len(vectors))
        self._lists: Any = None
        self._aside: tuple[np.ndarray, torch.Tensor, torch.Tensor, AdaptiveBatch] | None = None
        if exact is not None and len(vectors) > exact:
            self._build(min(k, len(vectors) - 1))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Length d of a vector."""
        return self.vectors.shape[1]

    def tensors(self) -> dict[str, np.ndarray]:
        """The index: the vectors, and `lists`."""
        return {"vectors": self.vectors, **self.lists()}

    def lists(self) -> dict[str, np.ndarray]:
        """centroid float32 [lists, d], list int32 [n] of each vector, tried float64 [t, 3] (effort, recall, k: `SearchQuality`); none of
        them where the search is exact."""
        if self._lists is None:
            return {}
        tried = [(effort, recall, self.quality.k) for effort, recall in self.quality.tried]
        return {
            "centroid": self._centroid,
            "list": self._assigned,
            "tried": np.array(tried, np.float64),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, np.ndarray], prefix: str, vectors: np.ndarray | None = None
    ) -> NeighbourIndex:
        """Restore what `tensors` gave, or with `vectors` what `lists` gave, here with names that begin with `prefix`.

        Nothing is learned again. Raises KeyError for a missing array and RaypipeError for arrays that are no index.
        """
        index = cls(tensors[prefix + "vectors"] if vectors is None else vectors)
        if any(prefix + name in tensors for name in TENSORS):
            centroid, assigned, tried = (np.asarray(tensors[prefix + name]) for name in TENSORS)
            index._check_lists(centroid, assigned, tried)
            index._fill(centroid.astype(np.float32), assigned.astype(np.int32))
            index._settle(
                [(int(effort), float(recall)) for effort, recall, _ in tried], int(tried[0, 2])
            )
        return index

    def search(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distance float32 [m, k] and row int64 [m, k] of the nearest vectors, nearest first, equal ones by row.

        k is cut to the number of vectors there are. `exclude`, int64 [m], names one row for each query that is never its
        neighbour (a scored sample itself, even when others have the same embedding); k is then at most n - 1.
        Raises RaypipeError when a query is not finite or of another width.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise RaypipeError(
                f"embeddings of shape {list(queries.shape)} do not fit neighbours of width {self.width}"
            )
        _check_finite(queries)
        k = min(k, len(self) - (exclude is not None))
        if k == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if self._lists is None:
            return self._nearest(self._exactly, queries, k, exclude)
        distance, row = self._nearest(self._from_lists, queries, k, exclude)
        short = np.flatnonzero(np.isinf(distance[:, -1]))  # the lists read hold fewer than k
        if len(short):
            own = None if exclude is None else np.asarray(exclude)[short]
            distance[short], row[short] = self._nearest(self._exactly, queries[short], k, own)
        return distance, row

    def _nearest(
        self, candidates: Candidates, queries: np.ndarray, k: int, exclude: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        faiss.omp_set_num_threads(torch.get_num_threads())
        wanted = min(k + SLACK, len(self))
        distance, row = (
            np.empty((len(queries), k), np.float32),
            np.empty((len(queries), k), np.int64),
        )
        for start in range(0, len(queries), QUERIES):
            part = slice(start, start + QUERIES)
            found = candidates(queries[part], wanted)
            found.sort(axis=1)
            away = self._distances(queries[part], found)
            away[found < 0] = np.inf
            if exclude is not None:
                away[found == np.asarray(exclude)[part, None]] = np.inf
            order = away.argsort(axis=1, kind="stable")[:, :k]
            distance[part] = np.take_along_axis(away, order, 1)
            row[part] = np.take_along_axis(found, order, 1)
        return distance, row

    def _distances(self, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Of each query to the vectors found for it, float32 [m, c]."""
        away = np.empty(found.shape, np.float32)
        step = max(1, CHUNK_VALUES // (found.shape[1] * self.width))
        for start in range(0, len(found), step):
            part = slice(start, start + step)
            difference = self.vectors[found[part]]
            difference -= queries[part, None]
            np.sqrt(np.square(difference, out=difference).sum(2), out=away[part])
        return away

    def _exactly(self, queries: np.ndarray, wanted: int) -> np.ndarray:
        if self.device != "cpu":
            return self._by_product(queries, wanted)
        return faiss.knn(queries, self.vectors, wanted)[1]

    def _by_product(self, queries: np.ndarray, wanted: int) -> np.ndarray:
        """What `_exactly` gives, in any order: rows int64 [m, wanted] of the vectors v of least |v|^2 - 2 <q, v>, computed on the device."""
        if self._aside is None:
            centre = self.vectors.mean(
                0
            )  # without it the lengths of the vectors would take the digits of their distances
            vectors = to_device(self.vectors - centre, self.device)
            self._aside = (
                centre,
                vectors,
                vectors.square().sum(1),
                AdaptiveBatch(max(1, PRODUCT_VALUES // len(self))),
            )
        centre, vectors, square, at_once = self._aside

        def nearest(part: torch.Tensor) -> torch.Tensor:
            return (
                torch.addmm(square, part, vectors.T, alpha=-2)
                .topk(wanted, largest=False, sorted=False)
                .indices
            )

        with torch.inference_mode(), computing("float32", torch.device(self.device).type):
            return (
                torch.cat(at_once(nearest, to_device(queries - centre, self.device))).cpu().numpy()
            )

    def _from_lists(self, queries: np.ndarray, wanted: int) -> np.ndarray:
        return self._lists.search(queries, wanted)[1]

    def _build(self, k: int) -> None:
        """Divide the vectors into lists and find the effort that finds enough of their k nearest neighbours, if there is one."""
        faiss.omp_set_num_threads(torch.get_num_threads())
        count = round(LISTS * math.sqrt(len(self)))
        means = faiss.Clustering(self.width, count)
        means.seed, means.niter = 0, ROUNDS
        means.min_points_per_centroid, means.max_points_per_centroid = 1, POINTS_PER_LIST
        means.train(self.vectors, faiss.IndexFlatL2(self.width))
        centroid = faiss.vector_to_array(means.centroids).reshape(count, self.width)
        assigned = faiss.knn(self.vectors, centroid, 1)[1][:, 0]
        rows = np.unique(
            np.linspace(0, len(self) - 1, min(len(self), RECALL_ROWS)).astype(np.int64)
        )
        search = functools.partial(self._nearest, queries=self.vectors[rows], k=k, exclude=rows)
        farthest = search(self._exactly)[0][:, -1:] * np.float32(
            1 + 1e-6
        )  # of equally far ones any will do
        self._fill(centroid, assigned.astype(np.int32))
        most, tried = max(1, count // MOST_OF_LISTS), []
        effort = min(FIRST_EFFORT, most)
        while True:
            self._lists.nprobe = effort
            tried.append((effort, float((search(self._from_lists)[0] <= farthest).mean())))
            if tried[-1][1] >= LEAST_RECALL:
                return self._settle(tried, k)
            if effort == most:
                self._lists = None
                del self._centroid, self._assigned
                self.quality = SearchQuality(len(self), 0, tuple(tried), k)
                return None
            effort = min(2 * effort, most)

    def _fill(self, centroid: np.ndarray, assigned: np.ndarray) -> None:
        """Sort the vectors into their lists."""
        self._centroid, self._assigned = np.ascontiguousarray(centroid), assigned
        quantizer = faiss.IndexFlatL2(self.width)
        quantizer.add(self._centroid)
        self._lists = faiss.IndexIVFFlat(quantizer, self.width, len(centroid))
        places = assigned.astype(np.int64)
        self._lists.add_core(len(self), faiss.swig_ptr(self.vectors), None, faiss.swig_ptr(places))

    def _settle(self, tried: list[tuple[int, float]], k: int) -> None:
        self.quality = SearchQuality(len(self), len(self._centroid), tuple(tried), k)
        self._lists.nprobe = self.quality.effort

    def _check_lists(self, centroid: np.ndarray, assigned: np.ndarray, tried: np.ndarray) -> None:
        """Raises RaypipeError where FAISS would read what is not there."""
        good = (
            centroid.ndim == 2
            and centroid.shape[1] == self.width
            and (np.abs(centroid) <= np.finfo(np.float32).max).all()
            and assigned.shape == (len(self),)
            and assigned.dtype.kind == "i"
            and ((assigned >= 0) & (assigned < len(centroid))).all()
            and tried.ndim == 2
            and tried.shape[1] == 3
            and len(tried)
            and np.isfinite(tried).all()
            and ((tried[:, 0] >= 1) & (tried[:, 0] <= len(centroid))).all()
        )
        if not good:
            raise RaypipeError(
                "the neighbour index is damaged (its lists do not fit its vectors); fit the extrapolator again"
            )


class ClassNeighbours:
    """Finds the nearest vectors of a sample's own class. Memory: the labelled vectors once more, as `NeighbourIndex`."""

    def __init__(
        self,
        vectors: np.ndarray,
        label: np.ndarray,
        exact: int | None = None,
        k: int = 20,
        lists: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Index float32 [n, d] by class, int64 [n]; -1, no label, belongs to none. A class is an index of its own: see `NeighbourIndex`
        for `exact`, k and what is raised. `lists`, what `lists` gave for the same vectors, restores these instead."""
        self._rows = {int(y): np.flatnonzero(label == y) for y in np.unique(label[label >= 0])}
        if lists is None:
            self._parts = {
                y: NeighbourIndex(vectors[rows], exact, k) for y, rows in self._rows.items()
            }
        else:
            self._parts = {
                y: NeighbourIndex.from_tensors(lists, f"{y}.", vectors[rows])
                for y, rows in self._rows.items()
            }

    def lists(self) -> dict[str, np.ndarray]:
        """`NeighbourIndex.lists` of every class, each below the number of the class; empty where no class has any."""
        return {
            f"{y}.{name}": value
            for y, part in self._parts.items()
            for name, value in part.lists().items()
        }

    def quality(self) -> dict[int, SearchQuality]:
        """Of every class for which lists were tried."""
        return {y: part.quality for y, part in self._parts.items() if part.quality.tried}

    def search(
        self, queries: np.ndarray, label: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distance float32 [m, k] and row int64 [m, k] of the nearest of the same class, nearest first.

        Where a class has fewer than k, or a query no label, places are left over: distance infinite, row -1. `exclude`, int64
        [m], names one row for each query that is never its neighbour, of the query's class (a scored sample itself).
        """
        distance, row = (
            np.full((len(queries), k), np.inf, np.float32),
            np.full((len(queries), k), -1, np.int64),
        )
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
        raise RaypipeError(
            f"{bad} of {len(vectors)} embeddings have values that are not finite; leave these samples out"
        )
