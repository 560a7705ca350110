"""Clusters of features: a linear rule that assigns features to clusters, and spherical k-means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch  # before faiss: both bring an OpenMP library, and only this order works everywhere

import faiss  # isort: skip
from raypipe.errors import StageError


@dataclass(frozen=True)
class Clusters:
    """A linear rule that assigns features to clusters.

    x is in cluster argmax_k of <weight_k, u> + bias_k, where u = (x - centre) / |x - centre|.

    Attributes
    ----------
    centre : np.ndarray
        Mean of the features that the clusters were found in, float32 [d]. Without it, embeddings
        behind a ReLU would all point in one direction.
    weight : np.ndarray
        float32 [K, d].
    bias : np.ndarray
        float32 [K].
    """

    centre: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the cluster of each feature vector, int64 [n] for float32 [n, d]."""
        return np.argmax(directions(features, self.centre) @ self.weight.T + self.bias, axis=1)

    def by_size(self, features: np.ndarray) -> Clusters:
        """Return the same clusters, sorted by their number of features, largest first."""
        order = np.argsort(-np.bincount(self(features), minlength=len(self.weight)), kind="stable")
        return Clusters(self.centre, self.weight[order], self.bias[order])


def directions(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return unit vectors from the centre to the features, float32 [n, d]."""
    moved = np.asarray(features, np.float32) - centre
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)


def kmeans(
    features: np.ndarray, clusters: int, *, restarts: int, iterations: int, seed: int
) -> Clusters:
    """Return clusters by spherical k-means (Dhillon and Modha 2001), computed by FAISS.

    The best of several starts is returned: the one with the largest mean cosine between a sample
    and its centroid. Each start is drawn by k-means++.

    Parameters
    ----------
    features : np.ndarray
        float32 [n, d].
    clusters : int
        Number of clusters.
    restarts : int
        Number of starts.
    iterations : int
        Iterations per start.
    seed : int
        Seed of the first start; the others use the following numbers.

    Raises
    ------
    StageError
        If there are fewer samples than clusters, or a feature is not finite.
    """
    from sklearn.cluster import kmeans_plusplus

    centre, points = centred_directions(features, clusters)
    best, best_centroids = -np.inf, np.empty(0, np.float32)
    for restart in range(restarts):
        # On the sphere, spherical k-means differs from k-means only in the length of the centroids.
        # So starts drawn for k-means are good ones here as well.
        start, _ = kmeans_plusplus(
            points, clusters, random_state=np.random.RandomState(seed + restart)
        )
        engine = faiss.Kmeans(
            points.shape[1],
            clusters,
            niter=iterations,
            spherical=True,
            seed=seed + restart,
            min_points_per_centroid=1,
            max_points_per_centroid=len(points),  # otherwise FAISS drops the points beyond
        )
        engine.train(points, init_centroids=np.ascontiguousarray(start, np.float32))
        centroids = np.array(engine.centroids, np.float32)
        mean_cosine = float((points @ centroids.T).max(1).mean(dtype=np.float64))
        if mean_cosine > best:
            best, best_centroids = mean_cosine, centroids
    return Clusters(centre, best_centroids, np.zeros(clusters, np.float32)).by_size(features)


def centred_directions(features: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the centre, float32 [d], and the directions, float32 [n, d], of features.

    Raises
    ------
    StageError
        If there are fewer samples than clusters, or a feature is not finite.
    """
    if len(features) < clusters:
        raise StageError(
            f"{len(features)} seed samples cannot form {clusters} clusters; lower "
            "pseudo_labels.clusters or raise seed.fraction"
        )
    if not np.isfinite(features).all():
        raise StageError(
            "the features of some seed samples are not finite; lower pseudo_labels.lr, or check "
            "pseudo_labels.weights"
        )
    centre = features.mean(0, dtype=np.float64).astype(np.float32)
    return centre, np.ascontiguousarray(directions(features, centre))


def scaled_tensor(points: np.ndarray) -> torch.Tensor:
    """Return directions as a tensor with entries of about unit variance.

    Step sizes of gradient methods are meant for such entries.
    """
    return torch.from_numpy(points * np.float32(np.sqrt(points.shape[1])))
