"""k-means and TURTLE find existing clusters."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from raypipe.errors import StageError
from raypipe.pseudo_labels.clusters import Clusters, directions, kmeans
from raypipe.pseudo_labels.turtle import turtle


def gaussians(
    samples: int = 600, clusters: int = 6, width: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return features around random centres, far from the origin like embeddings after a ReLU."""
    random = np.random.default_rng(seed)
    centres, label = 3 + random.normal(size=(clusters, width)), random.choice(clusters, samples)
    return (centres[label] + 0.35 * random.normal(size=(samples, width))).astype(np.float32), label


def by_kmeans(features: np.ndarray, clusters: int, seed: int = 0, restarts: int = 10) -> Clusters:
    return kmeans(features, clusters, restarts=restarts, iterations=50, seed=seed)


def by_turtle(features: np.ndarray, clusters: int, seed: int = 0) -> Clusters:
    return turtle(features, clusters, steps=120, gamma=10.0, seed=seed)


@pytest.mark.parametrize("find", [by_kmeans, by_turtle])
def test_gaussians_are_told_apart(find) -> None:
    features, label = gaussians()
    rule = find(features[:400], 6)
    assert adjusted_rand_score(label[:400], rule(features[:400])) > 0.95
    assert adjusted_rand_score(label[400:], rule(features[400:])) > 0.95, (
        "the rule holds for samples it was not found on"
    )
    sizes = np.bincount(rule(features[:400]))
    assert sizes.tolist() == sorted(sizes, reverse=True), "the largest cluster is the first"
    again = find(features[:400], 6)
    assert np.array_equal(again.weight, rule.weight), "the same seed gives the same clusters"


def test_the_rule_is_the_nearest_centroid_on_the_sphere() -> None:
    features, _ = gaussians()
    rule = by_kmeans(features, 6)
    unit = directions(features, rule.centre)
    assert np.allclose(np.linalg.norm(rule.weight, axis=1), 1, atol=1e-5)
    nearest = np.square(unit[:, None] - rule.weight[None]).sum(2).argmin(1)
    assert np.array_equal(rule(features), nearest)


def test_more_starts_are_not_worse() -> None:
    # many local optima
    features = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)

    def value(restarts: int) -> float:
        rule = by_kmeans(features, 12, restarts=restarts)
        return float((directions(features, rule.centre) @ rule.weight.T).max(1).mean())

    assert value(8) > value(1), "a single start ends in a worse optimum here"


def test_the_entropy_keeps_labels_from_being_all_the_same() -> None:
    features, _ = gaussians()

    def largest(gamma: float) -> float:
        rule = turtle(features, 6, steps=100, gamma=gamma, seed=0)
        return np.bincount(rule(features)).max() / len(features)

    assert largest(10.0) < 0.25 < largest(0.0)


@pytest.mark.parametrize("find", [by_kmeans, by_turtle])
def test_what_cannot_be_clustered_is_refused(find) -> None:
    features, _ = gaussians()
    with pytest.raises(StageError, match=r"5 seed samples cannot form 6 clusters.*seed\.fraction"):
        find(features[:5], 6)
    features[3, 3] = np.nan
    with pytest.raises(StageError, match="not finite"):
        find(features, 6)
