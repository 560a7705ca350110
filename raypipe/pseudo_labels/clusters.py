"""Clusters of features: a linear rule that says which one a feature vector is in, and spherical k-means, which finds such a rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch  # before faiss: each brings an OpenMP library, and this order is the one that works everywhere

import faiss  # isort: skip
from raypipe.errors import StageError


@dataclass(frozen=True)
class Clusters:
    """x is in cluster argmax over k of <weight_k, u> + bias_k, where u = (x - centre) / |x - centre|.

    centre  float32 [d], mean of the features that the clusters were found in: embeddings behind a ReLU all point one way without it
    weight  float32 [K, d];  bias  float32 [K]
    """

    centre: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Number of the cluster of each of float32 [n, d]: int64 [n]."""
        return np.argmax(directions(features, self.centre) @ self.weight.T + self.bias, axis=1)

    def by_size(self, features: np.ndarray) -> Clusters:
        """The same clusters in the order of how many of the features are in them, the largest first."""
        order = np.argsort(-np.bincount(self(features), minlength=len(self.weight)), kind="stable")
        return Clusters(self.centre, self.weight[order], self.bias[order])


def directions(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Unit vectors from the centre to float32 [n, d]."""
    moved = np.asarray(features, np.float32) - centre
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)


def kmeans(
    features: np.ndarray, clusters: int, *, restarts: int, iterations: int, seed: int
) -> Clusters:
    """Spherical k-means (Dhillon and Modha 2001) by FAISS: the best of some starts, each drawn by k-means++.

    features    float32 [n, d]
    restarts    starts; that of the largest mean cosine of a sample with its centroid is taken
    iterations  rounds of each
    Raises StageError for fewer samples than clusters, and for features that are not finite.
    """
    from sklearn.cluster import kmeans_plusplus

    centre, points = prepared(features, clusters)
    best, found = -np.inf, np.empty(0, np.float32)
    for restart in range(restarts):
        # spherical k-means is k-means on the sphere but for the length of the centroids, so that its starts are good ones here, too
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
            max_points_per_centroid=len(points),  # FAISS leaves out what is beyond
        )
        engine.train(points, init_centroids=np.ascontiguousarray(start, np.float32))
        centroids = np.array(engine.centroids, np.float32)
        value = float((points @ centroids.T).max(1).mean(dtype=np.float64))
        if value > best:
            best, found = value, centroids
    return Clusters(centre, found, np.zeros(clusters, np.float32)).by_size(features)


def prepared(features: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre float32 [d] and directions float32 [n, d] of features. Raises StageError where clusters cannot be found in them."""
    if len(features) < clusters:
        raise StageError(
            f"{len(features)} seed samples cannot make {clusters} clusters; lower pseudo_labels.clusters or raise seed.fraction"
        )
    if not np.isfinite(features).all():
        raise StageError(
            "the features of some seed samples are not finite; lower pseudo_labels.lr, or check pseudo_labels.weights"
        )
    centre = features.mean(0, dtype=np.float64).astype(np.float32)
    return centre, np.ascontiguousarray(directions(features, centre))


def torch_points(points: np.ndarray) -> torch.Tensor:
    """Directions as a tensor whose entries have about unit variance, which is what step sizes of gradient methods are meant for."""
    return torch.from_numpy(points * np.float32(np.sqrt(points.shape[1])))
