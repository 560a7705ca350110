"""The nearest neighbours of the samples of a block among themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

EXACT_SAMPLES = 1 << 14
"""Maximum number of samples that are searched exactly; above it, inverted lists are used if their
recall is at least 0.95 (`raypipe.extrapolators.neighbours`)."""


def nearest_neighbours(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest other samples of each sample, nearest first.

    Parameters
    ----------
    vectors : np.ndarray
        float32 [n, d].
    k : int
        Number of neighbours, at most n - 1 of which exist.

    Returns
    -------
    distance : np.ndarray
        Euclidean, float64 [n, min(k, n - 1)].
    row : np.ndarray
        int32 of that shape.
    """
    # imports torch, which takes seconds
    from raypipe.extrapolators.neighbours import NeighbourIndex

    index = NeighbourIndex(vectors, EXACT_SAMPLES, k)
    distance, row = index.search(vectors, k, np.arange(len(vectors)))
    return distance.astype(np.float64), row.astype(np.int32)


def cosine_graph(vectors: np.ndarray, k: int) -> csr_array:
    """Return the cosine similarities of neighbours as a sparse matrix, float64 [n, n].

    Two samples are neighbours if one of them is among the k nearest of the other (by cosine
    similarity). Negative similarities and the diagonal are 0.
    """
    from scipy.sparse import csr_array

    n = len(vectors)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    distance, row = nearest_neighbours(vectors / np.where(length > 0, length, 1), k)
    similarity = np.maximum(1 - np.square(distance) / 2, 0)
    first = np.repeat(np.arange(n), row.shape[1])
    graph = csr_array((similarity.reshape(-1), (first, row.reshape(-1))), (n, n))
    graph = csr_array(graph.maximum(graph.T))
    graph.sort_indices()
    return graph
