"""No prediction leaves the range of the measured scores, except as far as held-out ones justify."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import softmax

from raypipe.extrapolators import make
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.features import Bounds

OPTIONS = {"mlp": {"epochs": 5}, "gnn": {"epochs": 2}}


def test_predictions_beyond_the_range_keep_their_order_within_it() -> None:
    bounds = Bounds.fit(np.array([-1.0, 0.5, 3.0]))
    predicted = np.linspace(-9, 9, 2001)
    bounded = bounds(predicted)
    assert bounded.dtype == np.float32 and (np.diff(bounded) >= 0).all()
    assert bounded.min() >= -1 and bounded.max() <= 3
    assert len(np.unique(bounded[predicted > 3])) > 100  # not tied at the end of the range
    inside = (predicted > -0.95) & (predicted < 2.95)
    np.testing.assert_array_equal(bounded[inside], predicted[inside].astype(np.float32))
    assert np.isfinite(bounds(np.array([1e300, -1e300]))).all()


@pytest.mark.parametrize("low", [0.1, -1e-4, 1e6 + 1 / 3])
def test_rounding_stays_within_the_range(low: float) -> None:
    bounds = Bounds(low, low * (1.1 if low > 0 else 0.9))
    bounded = bounds(np.array([-1e9, 1e9])).astype(np.float64)
    assert bounded.min() >= bounds.low and bounded.max() <= bounds.high


def test_held_out_samples_extend_the_range_only_if_they_support_it() -> None:
    score = np.r_[np.linspace(0, 1, 50), 1.1, 1.11, 1.12, 1.13]
    held = np.arange(50, 54)
    assert Bounds.fit(score, held, score[held]).high == pytest.approx(1.13 * 1.2)
    # predictions that overshoot do not count as support
    wrong = Bounds.fit(np.r_[score[:50], 0.2, 0.3, 0.4, 0.5], held, np.full(4, 5.0))
    assert (wrong.low, wrong.high) == (0, 1)
    assert Bounds.fit(score, held[:2], score[held[:2]]).high == 1.13  # too few
    assert Bounds.fit(score, held, np.full(4, np.nan)).high == 1.13


def test_without_a_range_predictions_stay_as_they_are() -> None:
    predicted = np.array([-1e9, 0.25, 1e9])
    np.testing.assert_array_equal(Bounds.from_meta({})(predicted), predicted.astype(np.float32))


@pytest.fixture(scope="module")
def memorised(problem) -> tuple[Nodes, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """300 scored samples with errors of 1e-4, and 300 others, some with errors up to 1.

    The score is linear in the error that a proxy would have without having seen the sample.
    """
    nodes, score = problem(600)
    rng, classes = np.random.default_rng(0), 4
    honest = rng.normal(2, 2, 600)
    logit = np.where(np.arange(600) < 300, 9 + 0.3 * honest, honest)
    own = np.eye(classes)[nodes.label] * logit[:, None]
    embedding = np.concatenate([nodes.embedding, own], 1)
    head = np.concatenate([np.zeros((classes, nodes.embedding.shape[1])), np.eye(classes)], 1)
    probability = softmax(own, 1)[np.arange(600), nodes.label]
    signals = np.stack([-np.log(probability), 2 * probability - 1], 1)
    return Nodes(embedding, nodes.label, signals), score, (head, np.zeros(classes))


@pytest.mark.parametrize("method", ["gnn", "knn", "mlp", "trees", "knn-published", "proxy"])
def test_a_memorised_seed_set_predicts_no_score_beyond_its_own(
    memorised, settings, method: str
) -> None:
    nodes, score, head = memorised
    model = make(settings(method, **OPTIONS.get(method, {})), 4)
    if method == "gnn":
        model.head = head
        model.members = 1
    model.fit(nodes.take(np.arange(300)), score[:300])
    low, high = score[:300].min(), score[:300].max()
    if method == "gnn":
        low, high = model._bounds.low, model._bounds.high
        assert high - low <= 1.4 * np.ptp(score[:300])
    slack = 0.01 * score[:300].std() if method == "proxy" else 1e-5
    predicted = model.predict(nodes.take(np.arange(300, 600)))
    assert predicted.min() >= low - slack and predicted.max() <= high + slack
    far = Nodes(nodes.embedding * 1e3, nodes.label, nodes.signals * 1e6)
    predicted = model.predict(far)
    assert predicted.min() >= low - slack and predicted.max() <= high + slack


def test_the_published_network_stays_within_the_range(memorised, settings) -> None:
    nodes, score, _ = memorised
    model = make(settings("gnn-published", epochs=2), 4)
    model.fit_graph(nodes, np.arange(300), score[:300])
    model.attach_graph(Nodes(nodes.embedding * 1e3, nodes.label, nodes.signals))
    predicted = model.predict_rows(np.arange(600))
    assert predicted.min() >= score[:300].min() and predicted.max() <= score[:300].max()
    again = make(settings("gnn-published"), 4)
    tensors, meta = model.state()
    again.load_state(tensors, json.loads(json.dumps(meta, allow_nan=False)))
    assert again._bounds == model._bounds
