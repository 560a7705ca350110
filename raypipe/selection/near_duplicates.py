"""Near-duplicates in embedding space: of samples that look the same, keep the best-scored one.

After SemDeDup (Abbas et al. 2023, arXiv 2303.09540): k-means divides the embeddings into
clusters, and only pairs within a cluster are compared. So the cost grows with n times the cluster
size, not with n^2. Pairs on both sides of a cluster border are missed. Unlike SemDeDup, a sample
is removed for being near one that *stays*, not for being near any other: a chain of small steps
does not remove everything but its head.
"""

from __future__ import annotations

import numpy as np

BLOCK_ROWS = 1024
"""Embeddings compared at a time."""
TILE_ROWS = 16
"""Rows that a product of matrices computes alike; the last ones of another number can round
differently."""
ROUNDING = 1e-6
"""A similarity this far below the threshold counts: rounding moves that of equal embeddings from 1.
"""
CLUSTER_SIZE = 4096
"""Average samples per cluster. Up to twice as many form one cluster, with all pairs compared."""
POINTS_PER_CLUSTER, ITERATIONS, SEED = 32, 10, 1234
"""Of k-means."""


def clusters_for(samples: int) -> int:
    """Return the number of clusters for a number of samples."""
    return 1 if samples <= 2 * CLUSTER_SIZE else -(-samples // CLUSTER_SIZE)


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Return vectors scaled to length 1, float32 [n, d]; vectors of length 0 stay as they are."""
    values = np.asarray(vectors, np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(length > 0, length, 1)


def centroids(vectors: np.ndarray, clusters: int) -> np.ndarray:
    """Return the centroids of spherical k-means by FAISS, float32 [clusters, d].

    `vectors` are unit vectors [n, d], with n at least `clusters`. The result depends on nothing
    else.
    """
    import torch  # noqa: F401  # before faiss: see raypipe.extrapolators.neighbours

    import faiss  # isort: skip

    means = faiss.Clustering(vectors.shape[1], clusters)
    means.niter, means.seed, means.spherical = ITERATIONS, SEED, True
    means.min_points_per_centroid, means.max_points_per_centroid = 1, POINTS_PER_CLUSTER
    means.train(vectors, faiss.IndexFlatIP(vectors.shape[1]))
    return faiss.vector_to_array(means.centroids).reshape(clusters, -1).copy()


def nearest_centroid(vectors: np.ndarray, centroid: np.ndarray) -> np.ndarray:
    """Return the centroid with the highest cosine similarity for each unit vector, int64 [n].

    Each result depends on its own vector alone, bit for bit: blocks are padded to whole tiles.
    """
    result = np.zeros(len(vectors), np.int64)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors[start : start + BLOCK_ROWS]
        whole = np.zeros((-(-len(block) // TILE_ROWS) * TILE_ROWS, block.shape[1]), block.dtype)
        whole[: len(block)] = block
        result[start : start + BLOCK_ROWS] = (whole @ centroid.T).argmax(1)[: len(block)]
    return result


def redundant(
    vectors: np.ndarray, threshold: float, protected: np.ndarray | None = None
) -> np.ndarray:
    """Return which samples are near-duplicates of an earlier sample that stays, bool [n].

    Every pair is compared.

    Parameters
    ----------
    vectors : np.ndarray
        Unit vectors [n, d], in order of preference.
    threshold : float
        Cosine similarity from which two samples are near-duplicates.
    protected : np.ndarray, optional
        Samples that always stay, bool [n]. They should come first.

    Notes
    -----
    Memory: in addition to the vectors, a copy of those that stay.
    """
    minimum = threshold - ROUNDING
    safe = np.zeros(len(vectors), bool) if protected is None else protected
    staying, count = np.empty_like(vectors), 0
    removed = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block, block_safe = vectors[start : start + BLOCK_ROWS], safe[start : start + BLOCK_ROWS]
        near = np.zeros(len(block), bool)
        for other in range(0, count, BLOCK_ROWS):
            near |= (block @ staying[other : min(other + BLOCK_ROWS, count)].T >= minimum).any(1)
        rows = np.flatnonzero(~near | block_safe)
        alike = np.tril(block[rows] @ block[rows].T >= minimum, -1)
        stays = np.ones(len(rows), bool)
        for position in np.flatnonzero(alike.any(1) & ~block_safe[rows]).tolist():
            stays[position] = not (alike[position] & stays).any()
        new = rows[stays]
        staying[count : count + len(new)] = block[new]
        count += len(new)
        removed[start : start + BLOCK_ROWS] = True
        removed[start + new] = False
    return removed
