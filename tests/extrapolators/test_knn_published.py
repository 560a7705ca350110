from __future__ import annotations

import math

import numpy as np
import pytest

from raypipe.config import ExtrapolateSettings
from raypipe.errors import ConfigError, RaypipeError
from raypipe.extrapolators import METHODS, make
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.published.knn import KnnPublished


def plain_loop(seed: Nodes, score: np.ndarray, nodes: Nodes, k: int) -> list[float]:
    result = []
    for z in nodes.embedding.astype(float):
        near = sorted(
            (math.sqrt(((z - other) ** 2).sum()), row)
            for row, other in enumerate(seed.embedding.astype(float))
        )[:k]
        weights = [math.exp(-distance) for distance, _ in near]
        result.append(sum(w * score[row] for w, (_, row) in zip(weights, near)) / sum(weights))
    return result


@pytest.mark.parametrize("k", [1, 20])
def test_published_formula(problem, settings, k: int) -> None:
    nodes, score = problem(120)
    seed, rest = nodes.take(np.arange(60)), nodes.take(np.arange(60, 120))
    knn = KnnPublished(settings("knn-published", neighbours=k), 4)
    knn.fit(seed, score[:60])
    np.testing.assert_allclose(knn.predict(rest), plain_loop(seed, score[:60], rest, k), rtol=1e-5)


def test_default_is_twenty_neighbours_and_labels_do_not_matter(problem, settings) -> None:
    nodes, score = problem(120)
    seed, rest = nodes.take(np.arange(60)), nodes.take(np.arange(60, 120))
    knn = KnnPublished(settings("knn-published"), 4)
    knn.fit(seed, score[:60])
    np.testing.assert_allclose(knn.predict(rest), plain_loop(seed, score[:60], rest, 20), rtol=1e-5)
    unlabelled = Nodes(rest.embedding, np.full(60, -1), rest.signals)
    np.testing.assert_array_equal(knn.predict(rest), knn.predict(unlabelled))


def test_large_distances_are_not_nan(settings) -> None:
    seed = Nodes(np.array([[0.0], [1000.0], [5000.0]]), np.zeros(3), np.zeros((3, 0)))
    knn = KnnPublished(settings("knn-published"), 1)
    knn.fit(seed, np.array([1.0, 2.0, 3.0]))
    # exp(-d) is 0 in float32 for every one of these distances
    np.testing.assert_allclose(
        knn.predict(Nodes(np.array([[2000.0], [3000.0]]), np.zeros(2), np.zeros((2, 0)))),
        [2.0, 2.5],
    )


def test_round_trip(problem, settings) -> None:
    nodes, score = problem(80)
    knn = KnnPublished(settings("knn-published"), 4)
    knn.fit(nodes.take(np.arange(50)), score[:50])
    again = KnnPublished(settings("knn-published"), 4)
    again.load_state(*knn.state())
    rest = nodes.take(np.arange(50, 80))
    np.testing.assert_array_equal(knn.predict(rest), again.predict(rest))
    np.testing.assert_array_equal(knn.difficulty(rest), again.difficulty(rest))


def test_difficulty_is_relative_to_the_seed_set(problem, settings) -> None:
    nodes, score = problem(300)
    knn = KnnPublished(settings("knn-published"), 4)
    knn.fit(nodes.take(np.arange(200)), score[:200])
    rest = nodes.take(np.arange(200, 300))
    assert np.median(knn.difficulty(rest)) == pytest.approx(1, abs=0.15)
    far = Nodes(rest.embedding + 100, rest.label, rest.signals)
    assert knn.difficulty(far).min() > 10


def test_errors_name_what_is_wrong(problem, settings) -> None:
    nodes, score = problem(30)
    knn = KnnPublished(settings("knn-published"), 4)
    with pytest.raises(RaypipeError, match="not fitted"):
        knn.predict(nodes)
    with pytest.raises(RaypipeError, match="2 of 30 measured scores"):
        knn.fit(nodes, np.r_[score[:28], np.nan, np.inf])
    with pytest.raises(RaypipeError, match="30 seed samples but scores of shape"):
        knn.fit(nodes, score[:29])
    with pytest.raises(RaypipeError, match="too few"):
        knn.fit(nodes.take(np.arange(0)), score[:0])
    with pytest.raises(RaypipeError, match=r"labels are outside -1\.\.1"):
        KnnPublished(settings("knn-published"), 2).fit(nodes, score)
    knn.fit(nodes, score)
    with pytest.raises(RaypipeError, match="embeddings are 3 wide"):
        knn.predict(Nodes(nodes.embedding[:, :3], nodes.label, nodes.signals))
    tensors, meta = knn.state()
    with pytest.raises(RaypipeError, match="cannot be loaded as"):
        KnnPublished(settings("knn-published"), 4).load_state(tensors, {**meta, "method": "gnn"})
    with pytest.raises(RaypipeError, match="scores do not match"):
        KnnPublished(settings("knn-published"), 4).load_state(
            {**tensors, "score": tensors["score"][:3]}, meta
        )
    with pytest.raises(RaypipeError, match="'typical' is missing"):
        KnnPublished(settings("knn-published"), 4).load_state(
            tensors, {key: meta[key] for key in meta if key != "typical"}
        )


def test_nodes() -> None:
    nodes = Nodes(np.zeros((3, 2), np.float16), np.array([0, 1, -1], np.int32), np.zeros((3, 1)))
    assert nodes.embedding.dtype == np.float32 and nodes.label.dtype == np.int64 and len(nodes) == 3
    assert nodes.take(np.array([True, False, True])).label.tolist() == [0, -1]
    assert Nodes.concat([nodes, nodes.take(np.array([1]))]).label.tolist() == [0, 1, -1, 1]
    with pytest.raises(RaypipeError, match="different widths of signals"):
        Nodes.concat([nodes, Nodes(np.zeros((1, 2)), np.zeros(1), np.zeros((1, 3)))])
    with pytest.raises(RaypipeError, match="label has shape"):
        Nodes(np.zeros((3, 2)), np.zeros(2), np.zeros((3, 0)))
    with pytest.raises(RaypipeError, match="no samples"):
        Nodes.concat([])


def test_registry_knows_every_method() -> None:
    for method in METHODS:
        assert make(ExtrapolateSettings(method=method), 3).name == method
    with pytest.raises(ConfigError, match="no installed package declares the extrapolator"):
        make(ExtrapolateSettings.model_construct(method="magic"), 3)
