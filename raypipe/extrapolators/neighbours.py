"""Euclidean nearest neighbours among embeddings with FAISS: exact search, or inverted lists.

Above a number of vectors the search uses inverted lists (Jégou et al. 2011, "Product Quantization
for Nearest Neighbor Search", section IV, with whole vectors instead of codes). k-means divides n
vectors into about 2 sqrt(n) lists, one per centroid. A query reads only the lists of the centroids
nearest to it; `effort` is their number. The recall of such a search is measured when the index is
built, on vectors that are searched among the others. The effort is doubled until the recall is
0.95. If that would take a quarter of the lists, the search is exact after all, since exact search
is then faster too.

On a GPU an exact search is a matrix product followed by the smallest values of each row. Distances
to these candidates are computed as on a CPU, so both find the same neighbours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch  # before faiss: each brings an OpenMP library, and only this order works everywhere

import faiss  # isort: skip
from raypipe.errors import RaypipeError
from raypipe.vision.devices import AdaptiveBatch, to_device
from raypipe.vision.precision import use_precision

EXTRA_CANDIDATES = 8
"""Candidates requested beyond k. They are the smallest |a|^2 + |b|^2 - 2ab, which rounds; their
distances are then recomputed."""
QUERIES = 4096
"""Maximum number of queries searched at once."""
PRODUCT_VALUES = 1 << 28
"""Maximum number of float32 values in a product on a GPU (1 GiB)."""
CHUNK_VALUES = 1 << 20
"""Maximum number of float32 values held at once while distances are recomputed (4 MiB: more would
leave the cache)."""
MIN_RECALL = 0.95
"""Recall that a search by inverted lists must reach."""
RECALL_ROWS = 1000
"""Vectors on which the recall is measured."""
LISTS = 2.0
"""Number of lists, in units of the square root of the number of vectors."""
FIRST_EFFORT = 8
"""Lists read per query in the first attempt."""
MAX_EFFORT_DIVISOR = 4
"""Inverted lists are not used if a search would read more than one list in this many."""
POINTS_PER_LIST, KMEANS_ITERATIONS = 64, 10
"""Maximum number of vectors per centroid that k-means uses, and its iterations."""
LIST_TENSORS = ("centroid", "list", "tried")
"""Names of the arrays that describe inverted lists."""


class Neighbours(NamedTuple):
    """The nearest vectors of m queries, nearest first.

    Attributes
    ----------
    distance
        float32 [m, k].
    row
        Rows of the neighbours among the indexed vectors, int64 [m, k].
    """

    distance: np.ndarray
    row: np.ndarray


CandidateSearch = Callable[[np.ndarray, int], np.ndarray]
"""Takes queries, float32 [m, d], and a count c; returns candidate rows, int64 [m, c], -1 for none.
"""


@dataclass(frozen=True)
class SearchQuality:
    """How an index is searched, and with which recall.

    Attributes
    ----------
    vectors
        Number of indexed vectors.
    lists
        Number of inverted lists; 0 if the search is exact.
    tried
        Lists read per query and the resulting recall, in the order tried. If there are lists, the
        last attempt is in use.
    k
        Number of neighbours that the recall refers to.
    """

    vectors: int
    lists: int = 0
    tried: tuple[tuple[int, float], ...] = ()
    k: int = 0

    @property
    def recall(self) -> float:
        """Share of the k nearest vectors that a search finds."""
        return self.tried[-1][1] if self.lists else 1.0

    @property
    def effort(self) -> int:
        """Lists read per query; 0 if the search is exact."""
        return self.tried[-1][0] if self.lists else 0

    @property
    def note(self) -> str:
        """A note if the effort was raised or the lists were given up; else empty."""
        if len(self.tried) < 2 and (self.lists or not self.tried):
            return ""
        (first_effort, first_recall), (effort, recall) = self.tried[0], self.tried[-1]
        if self.lists:
            outcome = (
                f"search effort raised from {first_effort} to {effort} of {self.lists} lists, "
                f"recall {first_recall:.3f} to {recall:.3f}"
            )
        else:
            outcome = (
                f"inverted lists reach a recall of only {recall:.3f} even with {effort} of them "
                "read, so an exact, slower search is used"
            )
        return f"neighbours among {self.vectors:,} samples: {outcome}"

    def as_dict(self) -> dict[str, Any]:
        """Return the quality as JSON data."""
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


@dataclass(frozen=True)
class _DeviceVectors:
    """Centred vectors on a GPU, for exact search by matrix products.

    Without centring, the lengths of the vectors would use up the digits of their distances.
    """

    centre: np.ndarray
    vectors: torch.Tensor
    squared_length: torch.Tensor
    batches: AdaptiveBatch

    @classmethod
    def of(cls, vectors: np.ndarray, device: str) -> _DeviceVectors:
        centre = vectors.mean(0)
        centred = to_device(vectors - centre, device)
        batches = AdaptiveBatch(max(1, PRODUCT_VALUES // len(vectors)))
        return cls(centre, centred, centred.square().sum(1), batches)

    def nearest(self, count: int, queries: torch.Tensor) -> torch.Tensor:
        """Return the rows of least |v|^2 - 2 <q, v>, int64 [m, count], in any order."""
        products = torch.addmm(self.squared_length, queries, self.vectors.T, alpha=-2)
        return products.topk(count, largest=False, sorted=False).indices


class NeighbourIndex:
    """Finds the nearest of a fixed set of vectors.

    It holds the vectors, and a second copy of them if it uses inverted lists. The same vectors,
    `exact`, k and number of torch threads give the same index.

    Parameters
    ----------
    vectors
        Vectors to index, float32 [n, d].
    exact
        Maximum n for exact search; above it the index uses inverted lists. None: always exact.
    k
        Number of neighbours for which the recall of inverted lists is measured.

    Attributes
    ----------
    device
        Where an exact search runs: "cpu" or "cuda". It can be set at any time. Inverted lists are
        always searched on the CPU.

    Raises
    ------
    RaypipeError
        There is nothing to index or a value is not finite.
    """

    device = "cpu"

    def __init__(self, vectors: np.ndarray, exact: int | None = None, k: int = 20) -> None:
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or not vectors.size:
            raise RaypipeError(
                f"embeddings of shape {list(vectors.shape)} cannot be searched for neighbours"
            )
        _check_finite(vectors)
        self.vectors = vectors
        self.quality = SearchQuality(len(vectors))
        self._lists: Any = None  # faiss.IndexIVFFlat
        self._device_vectors: _DeviceVectors | None = None
        if exact is not None and len(vectors) > exact:
            self._build(min(k, len(vectors) - 1))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Length d of a vector."""
        return self.vectors.shape[1]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the index: the vectors, and `lists`."""
        return {"vectors": self.vectors, **self.lists()}

    def lists(self) -> dict[str, np.ndarray]:
        """Return the inverted lists; empty if the search is exact.

        Returns
        -------
        dict[str, np.ndarray]
            `centroid` float32 [lists, d], `list` int32 [n], the list of each vector, and `tried`
            float64 [t, 3], rows of (effort, recall, k) as in `SearchQuality`.
        """
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
        """Restore an index from its `tensors`, or from `vectors` and its `lists`.

        Nothing is learned again.

        Parameters
        ----------
        tensors
            Arrays whose names begin with `prefix`.
        prefix
            Prefix of the names.
        vectors
            The indexed vectors, if they are not among the tensors.

        Raises
        ------
        KeyError
            An array is missing.
        RaypipeError
            The arrays do not form an index.
        """
        index = cls(tensors[prefix + "vectors"] if vectors is None else vectors)
        if any(prefix + name in tensors for name in LIST_TENSORS):
            centroid, assigned, tried = (
                np.asarray(tensors[prefix + name]) for name in LIST_TENSORS
            )
            index._check_lists(centroid, assigned, tried)
            index._fill_lists(centroid.astype(np.float32), assigned.astype(np.int32))
            attempts = [(int(effort), float(recall)) for effort, recall, _ in tried]
            index._use_lists(attempts, int(tried[0, 2]))
        return index

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> Neighbours:
        """Find the nearest vectors of each query, nearest first, equally near ones by row.

        Parameters
        ----------
        queries
            float32 [m, d].
        k
            Number of neighbours, cut to the number of vectors, or with `exclude` to n - 1.
        exclude
            One row for each query that is never its neighbour, int64 [m]: the query itself if it is
            a scored sample. Others with the same embedding remain neighbours.

        Raises
        ------
        RaypipeError
            A query is not finite or has another width.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise RaypipeError(
                f"embeddings of shape {list(queries.shape)} do not fit neighbours of width "
                f"{self.width}"
            )
        _check_finite(queries)
        k = min(k, len(self) - (exclude is not None))
        if k == 0:
            return Neighbours(
                np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
            )
        if self._lists is None:
            return self._nearest(self._exact_candidates, queries, k, exclude)
        distance, row = self._nearest(self._list_candidates, queries, k, exclude)
        # the lists read for these queries hold fewer than k vectors
        short = np.flatnonzero(np.isinf(distance[:, -1]))
        if len(short):
            own = None if exclude is None else np.asarray(exclude)[short]
            exact = self._nearest(self._exact_candidates, queries[short], k, own)
            distance[short], row[short] = exact
        return Neighbours(distance, row)

    def _nearest(
        self, search: CandidateSearch, queries: np.ndarray, k: int, exclude: np.ndarray | None
    ) -> Neighbours:
        """Find candidates, recompute their distances and keep the k nearest."""
        faiss.omp_set_num_threads(torch.get_num_threads())
        candidate_count = min(k + EXTRA_CANDIDATES, len(self))
        nearest_distance = np.empty((len(queries), k), np.float32)
        nearest_row = np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), QUERIES):
            part = slice(start, start + QUERIES)
            candidates = search(queries[part], candidate_count)
            candidates.sort(axis=1)
            distance = self._distances(queries[part], candidates)
            distance[candidates < 0] = np.inf
            if exclude is not None:
                distance[candidates == np.asarray(exclude)[part, None]] = np.inf
            order = distance.argsort(axis=1, kind="stable")[:, :k]
            nearest_distance[part] = np.take_along_axis(distance, order, 1)
            nearest_row[part] = np.take_along_axis(candidates, order, 1)
        return Neighbours(nearest_distance, nearest_row)

    def _distances(self, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the distance of each query to its candidates, float32 [m, c]."""
        distance = np.empty(candidates.shape, np.float32)
        step = max(1, CHUNK_VALUES // (candidates.shape[1] * self.width))
        for start in range(0, len(candidates), step):
            part = slice(start, start + step)
            difference = self.vectors[candidates[part]]
            difference -= queries[part, None]
            np.sqrt(np.square(difference, out=difference).sum(2), out=distance[part])
        return distance

    def _exact_candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        if self.device != "cpu":
            return self._product_candidates(queries, count)
        return faiss.knn(queries, self.vectors, count)[1]

    def _product_candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return what `_exact_candidates` does, in any order, computed on `device`."""
        if self._device_vectors is None:
            self._device_vectors = _DeviceVectors.of(self.vectors, self.device)
        on_device = self._device_vectors
        with torch.inference_mode(), use_precision("float32", torch.device(self.device).type):
            nearest = functools.partial(on_device.nearest, count)
            centred = to_device(queries - on_device.centre, self.device)
            return torch.cat(on_device.batches(nearest, centred)).cpu().numpy()

    def _list_candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        return self._lists.search(queries, count)[1]

    def _build(self, k: int) -> None:
        """Divide the vectors into lists and raise the effort until the recall suffices.

        If no allowed effort suffices, the lists are dropped and the search is exact.
        """
        centroid, assigned = self._cluster()
        rows = np.unique(
            np.linspace(0, len(self) - 1, min(len(self), RECALL_ROWS)).astype(np.int64)
        )
        search = functools.partial(self._nearest, queries=self.vectors[rows], k=k, exclude=rows)
        # any of several equally distant vectors counts as found
        farthest = search(self._exact_candidates).distance[:, -1:] * np.float32(1 + 1e-6)
        self._fill_lists(centroid, assigned.astype(np.int32))
        max_effort = max(1, len(centroid) // MAX_EFFORT_DIVISOR)
        effort, attempts = min(FIRST_EFFORT, max_effort), []
        while True:
            self._lists.nprobe = effort
            recall = float((search(self._list_candidates).distance <= farthest).mean())
            attempts.append((effort, recall))
            if recall >= MIN_RECALL:
                return self._use_lists(attempts, k)
            if effort == max_effort:
                return self._drop_lists(attempts, k)
            effort = min(2 * effort, max_effort)

    def _cluster(self) -> tuple[np.ndarray, np.ndarray]:
        """Return k-means centroids, float32 [lists, d], and the nearest one of each vector."""
        faiss.omp_set_num_threads(torch.get_num_threads())
        count = round(LISTS * math.sqrt(len(self)))
        kmeans = faiss.Clustering(self.width, count)
        kmeans.seed, kmeans.niter = 0, KMEANS_ITERATIONS
        kmeans.min_points_per_centroid, kmeans.max_points_per_centroid = 1, POINTS_PER_LIST
        kmeans.train(self.vectors, faiss.IndexFlatL2(self.width))
        centroid = faiss.vector_to_array(kmeans.centroids).reshape(count, self.width)
        return centroid, faiss.knn(self.vectors, centroid, 1)[1][:, 0]

    def _fill_lists(self, centroid: np.ndarray, assigned: np.ndarray) -> None:
        """Put each vector into its list."""
        self._centroid, self._assigned = np.ascontiguousarray(centroid), assigned
        quantizer = faiss.IndexFlatL2(self.width)
        quantizer.add(self._centroid)
        self._lists = faiss.IndexIVFFlat(quantizer, self.width, len(centroid))
        places = assigned.astype(np.int64)
        self._lists.add_core(len(self), faiss.swig_ptr(self.vectors), None, faiss.swig_ptr(places))

    def _use_lists(self, attempts: list[tuple[int, float]], k: int) -> None:
        self.quality = SearchQuality(len(self), len(self._centroid), tuple(attempts), k)
        self._lists.nprobe = self.quality.effort

    def _drop_lists(self, attempts: list[tuple[int, float]], k: int) -> None:
        self._lists = None
        del self._centroid, self._assigned
        self.quality = SearchQuality(len(self), 0, tuple(attempts), k)

    def _check_lists(self, centroid: np.ndarray, assigned: np.ndarray, tried: np.ndarray) -> None:
        """Raise RaypipeError for arrays with which FAISS would read outside its memory."""
        valid = (
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
        if not valid:
            raise RaypipeError(
                "the neighbour index is damaged (its lists do not fit its vectors); "
                "fit the extrapolator again"
            )


class ClassNeighbours:
    """Finds the nearest vectors of a sample's own class.

    Each class has a `NeighbourIndex` of its own, so the labelled vectors are held once more.

    Parameters
    ----------
    vectors
        Vectors to index, float32 [n, d].
    label
        Their classes, int64 [n]; -1, no label, belongs to no class.
    exact, k
        As in `NeighbourIndex`, which also raises.
    lists
        Result of `lists` for the same vectors; restores those lists.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        label: np.ndarray,
        exact: int | None = None,
        k: int = 20,
        lists: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._rows = {int(y): np.flatnonzero(label == y) for y in np.unique(label[label >= 0])}
        self._indexes = {
            y: NeighbourIndex(vectors[rows], exact, k)
            if lists is None
            else NeighbourIndex.from_tensors(lists, f"{y}.", vectors[rows])
            for y, rows in self._rows.items()
        }

    def lists(self) -> dict[str, np.ndarray]:
        """Return `NeighbourIndex.lists` of every class, names prefixed by "<class>."."""
        return {
            f"{y}.{name}": value
            for y, index in self._indexes.items()
            for name, value in index.lists().items()
        }

    def quality(self) -> dict[int, SearchQuality]:
        """Return the search quality of every class for which lists were tried."""
        return {y: index.quality for y, index in self._indexes.items() if index.quality.tried}

    def search(
        self, queries: np.ndarray, label: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> Neighbours:
        """Find the nearest vectors of the same class, nearest first.

        Places are left over where a class has fewer than k vectors or a query has no label: their
        distance is infinite and their row -1.

        Parameters
        ----------
        queries
            float32 [m, d].
        label
            Their classes, int64 [m].
        k
            Number of neighbours.
        exclude
            One row of the query's class for each query that is never its neighbour, int64 [m]: the
            query itself if it is a scored sample.
        """
        distance = np.full((len(queries), k), np.inf, np.float32)
        row = np.full((len(queries), k), -1, np.int64)
        for y in np.unique(label):
            if int(y) not in self._indexes:
                continue
            class_rows, in_class = self._rows[int(y)], np.flatnonzero(label == y)
            own = np.searchsorted(class_rows, exclude[in_class]) if exclude is not None else None
            nearest = self._indexes[int(y)].search(queries[in_class], k, own)
            count = nearest.distance.shape[1]
            distance[in_class, :count] = nearest.distance
            row[in_class, :count] = class_rows[nearest.row]
        return Neighbours(distance, row)


def _check_finite(vectors: np.ndarray) -> None:
    bad = int((~np.isfinite(vectors).all(1)).sum())
    if bad:
        raise RaypipeError(
            f"{bad} of {len(vectors)} embeddings have values that are not finite; "
            "leave these samples out"
        )
