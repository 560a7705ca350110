"""Near duplicates in embedding space: of samples that look the same, the one with the highest score stays.

After SemDeDup (Abbas et al. 2023, arXiv 2303.09540): k-means divides the embeddings into clusters, and pairs are compared within a
cluster only, so the cost grows with n times the size of a cluster and not with n^2. Pairs on both sides of a border are missed.
Unlike there a sample is removed for being near one that *stays*, not for being near any: a chain of small steps does not
remove all but its head.
"""

from __future__ import annotations

import numpy as np

BLOCK = 1024
"""Embeddings compared at a time."""
ROUNDING = 1e-6
"""A similarity this far below the threshold counts: that of equal embeddings is 1 but for rounding in float32."""
CLUSTER = 4096
"""Samples in a cluster, on average; up to twice as many are one cluster, in which every pair is compared."""
POINTS_PER_CLUSTER, ROUNDS, SEED = 32, 10, 1234
"""Of k-means."""


def clusters_for(samples: int) -> int:
    """How many clusters so many samples are divided into."""
    return 1 if samples <= 2 * CLUSTER else -(-samples // CLUSTER)


def unit(vectors: np.ndarray) -> np.ndarray:
    """float32 [n, d] of length 1; vectors of length 0 stay."""
    values = np.asarray(vectors, np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(length > 0, length, 1)


def centroids(vectors: np.ndarray, clusters: int) -> np.ndarray:
    """float32 [clusters, d]: spherical k-means of unit vectors [n, d], n at least `clusters`, by FAISS. The same for the same vectors."""
    import torch  # noqa: F401  # before faiss: see raypipe.extrapolators.neighbours

    import faiss  # isort: skip

    means = faiss.Clustering(vectors.shape[1], clusters)
    means.niter, means.seed, means.spherical = ROUNDS, SEED, True
    means.min_points_per_centroid, means.max_points_per_centroid = 1, POINTS_PER_CLUSTER
    means.train(vectors, faiss.IndexFlatIP(vectors.shape[1]))
    return faiss.vector_to_array(means.centroids).reshape(clusters, -1).copy()


def nearest(vectors: np.ndarray, centroid: np.ndarray) -> np.ndarray:
    """int64 [n]: the centroid with which each unit vector has the highest cosine similarity."""
    result = np.zeros(len(vectors), np.int64)
    for start in range(0, len(vectors), BLOCK):
        result[start : start + BLOCK] = (vectors[start : start + BLOCK] @ centroid.T).argmax(1)
    return result


def superfluous(
    vectors: np.ndarray, threshold: float, protected: np.ndarray | None = None
) -> np.ndarray:
    """bool [n]: which of unit vectors [n, d], in order of preference, have one before them that stays and is that similar.

    Every pair is compared. `protected` ones, bool [n], stay; they should come first. Memory: beyond the vectors, once more those
    that stay.
    """
    least = threshold - ROUNDING
    safe = np.zeros(len(vectors), bool) if protected is None else protected
    staying, count = np.empty_like(vectors), 0
    gone = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), BLOCK):
        block, guarded = vectors[start : start + BLOCK], safe[start : start + BLOCK]
        near = np.zeros(len(block), bool)
        for other in range(0, count, BLOCK):
            near |= (block @ staying[other : min(other + BLOCK, count)].T >= least).any(1)
        rows = np.flatnonzero(~near | guarded)
        alike = np.tril(block[rows] @ block[rows].T >= least, -1)
        stays = np.ones(len(rows), bool)
        for position in np.flatnonzero(alike.any(1) & ~guarded[rows]).tolist():
            stays[position] = not (alike[position] & stays).any()
        kept = rows[stays]
        staying[count : count + len(kept)] = block[kept]
        count += len(kept)
        gone[start : start + BLOCK] = True
        gone[start + kept] = False
    return gone
