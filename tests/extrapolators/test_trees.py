from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor

from raypipe.errors import RaypipeError
from raypipe.extrapolators import tree_arrays as forest_module
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.neighbours import ClassNeighbours, NeighbourIndex
from raypipe.extrapolators.tree_arrays import Forest
from raypipe.extrapolators.trees import FEATURES, NeighbourStatistics, Trees


@pytest.mark.parametrize("trees", [1, 12])
def test_predicts_as_scikit_learn_does(monkeypatch, trees: int) -> None:
    monkeypatch.setattr(forest_module, "CHUNK_VALUES", 70 * trees)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    x[rng.random(x.shape) < 0.2] = np.nan
    y = np.nan_to_num(x[:, 0]) * np.where(np.isnan(x[:, 1]), 3, 1) + 7
    model = HistGradientBoostingRegressor(max_iter=12, max_leaf_nodes=8, early_stopping=False).fit(
        x[:300], y[:300]
    )
    forest = Forest.of(model, trees)
    expected = list(model.staged_predict(x))[trees - 1]
    np.testing.assert_allclose(forest.predict(x), expected, rtol=1e-12)
    again = Forest.from_tensors(
        {f"a.{name}": value for name, value in forest.tensors().items()}, "a.", 5
    )
    np.testing.assert_array_equal(again.predict(x), forest.predict(x))


def test_nodes_that_lead_nowhere_are_refused() -> None:
    x = np.random.default_rng(0).normal(size=(100, 2))
    tensors = Forest.of(HistGradientBoostingRegressor(max_iter=2).fit(x, x[:, 1]), 2).tensors()
    for name, value in (("left", 0), ("right", 10_000), ("feature", 2), ("root", -1)):
        broken = tensors[name].copy()
        broken[-1 if name == "root" else 0] = value
        with pytest.raises(ValueError, match="lead nowhere"):
            Forest.from_tensors(
                {**tensors, name: broken if name != "left" else np.full_like(broken, -1)}, "", 2
            )
    with pytest.raises(ValueError, match="differ in length"):
        Forest.from_tensors({**tensors, "value": tensors["value"][1:]}, "", 2)


def test_statistics_by_hand() -> None:
    seed = np.array([[0.0], [1.0], [3.0], [4.0], [7.0], [20.0]])
    label, score = np.array([0, 0, 1, 0, 0, -1]), np.array([1.0, 2.0, 5.0, 4.0, 8.0, 100.0])
    compute = NeighbourStatistics(ClassNeighbours(seed, label), label, score, 2.0)
    index = NeighbourIndex(seed)

    def statistics(nodes: Nodes, own: np.ndarray | None = None) -> np.ndarray:
        return compute(nodes, *index.search(nodes.embedding, 4, own), own)

    features = statistics(Nodes(seed[:1] + 0.25, np.array([0]), np.array([[9.0]])))[0]
    assert len(features) == FEATURES + 1 and features[-1] == 9
    # Five statistics of the nearest of any class, then of the four nearest, then the same for its
    # own class: mean, weighted mean, spread, least and mean distance.
    assert features[:5].tolist() == pytest.approx([1, 1, 0, 0.125, 0.125])
    weight = np.exp(-(np.array([0.25, 0.75, 2.75, 3.75]) - 0.25) / 2 / 0.2)
    assert features[6] == pytest.approx(weight @ [1, 2, 5, 4] / weight.sum())
    assert [*features[[5, 7, 8, 9]]] == pytest.approx([3, np.std([1, 2, 5, 4]), 0.125, 7.5 / 8])
    assert [*features[[15, 17, 18, 19]]] == pytest.approx(
        [3.75, np.std([1, 2, 4, 8]), 0.125, 11.5 / 8]
    )
    assert [*features[20:23]] == pytest.approx([0, 1, 0.75])
    left_out = statistics(Nodes(seed[:1], np.array([0]), np.array([[9.0]])), np.array([0]))[0]
    assert left_out[0] == 2 and left_out[15] == pytest.approx(14 / 3)
    bare = statistics(Nodes(seed[:1], np.array([-1]), np.zeros((1, 0))))[0]
    assert np.isnan(bare[10:]).all() and np.isfinite(bare[:10]).all()


def test_signals_are_used_where_they_tell(settings) -> None:
    rng = np.random.default_rng(0)
    nodes = Nodes(rng.normal(size=(400, 4)), rng.integers(0, 3, 400), rng.normal(size=(400, 3)))
    # no neighbour reveals this score, and no monotone map fits it
    score = np.abs(nodes.signals[:, 1]).astype(float)
    trees = Trees(settings("trees"), 3)
    trees.fit(nodes.take(np.arange(250)), score[:250])
    assert np.corrcoef(trees.predict(nodes.take(np.arange(250, 400))), score[250:])[0, 1] > 0.8


def test_a_damaged_forest_is_refused(problem, settings) -> None:
    nodes, score = problem(60)
    trees = Trees(settings("trees"), 4)
    trees.fit(nodes, score)
    tensors, meta = trees.state()
    for changed in (
        {"forest0.left": tensors["forest0.left"] * 0},
        {"forest1.feature": tensors["forest1.feature"] + 99},
    ):
        with pytest.raises(RaypipeError, match="damaged"):
            Trees(settings("trees"), 4).load_state({**tensors, **changed}, meta)


def test_neighbours_within_a_class() -> None:
    vectors, label = np.array([[0.0], [1.0], [2.0], [3.0], [9.0]]), np.array([0, 1, 0, 0, -1])
    index = ClassNeighbours(vectors, label)
    distance, row = index.search(np.array([[0.0], [0.0], [2.0], [0.0]]), np.array([0, 1, -1, 7]), 3)
    assert row.tolist() == [[0, 2, 3], [1, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert distance[0].tolist() == [0, 2, 3] and np.isinf(distance[1:, 1:]).all()
    _, row = index.search(vectors[[2, 1]], label[[2, 1]], 2, exclude=np.array([2, 1]))
    assert row.tolist() == [[3, 0], [-1, -1]]
