from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from raypipe.assessment.rehearsal import Rehearsal, rehearse
from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.blend import AnchorGnn
from raypipe.extrapolators.transfer import Transfer


def shifted(nodes: Nodes, hidden: np.ndarray, trained: np.ndarray, seed: int) -> Nodes:
    """Samples whose loss rises with the hidden part of the score, but falls if trained on."""
    rng = np.random.default_rng(seed)
    loss = np.where(trained, -hidden, 3 + 2 * hidden) + 0.1 * rng.normal(size=len(hidden))
    return Nodes(
        nodes.embedding, nodes.label, np.stack([np.exp(loss), rng.normal(size=len(hidden))], 1)
    )


@pytest.fixture(scope="module")
def world(problem, settings):
    """A seed set of 200 among 500 samples, and its rehearsal on 100.

    The embedding predicts half of the score, the loss the other half.
    """
    nodes, place = problem(500, noise=0)
    hidden = np.random.default_rng(1).normal(size=500)
    score = place / place.std() + hidden
    seed, half, rest = np.arange(200), np.arange(100), np.arange(100, 200)
    by_proxy = shifted(nodes, hidden, np.arange(500) < 200, 2)
    by_second = shifted(nodes, hidden, np.arange(500) < 100, 3)
    rehearsal = Rehearsal(
        by_second.take(half), score[half] * 0.5, by_second.take(rest), score[rest]
    )

    def make() -> AnchorGnn:
        return AnchorGnn(settings("gnn", epochs=4), 4)

    model = make()
    model.fit(by_proxy.take(seed), score[seed])
    return make, model, rehearsal, by_proxy.take(np.arange(200, 500)), score[200:]


def test_what_training_hides_is_learned_in_the_rehearsal(world) -> None:
    make, model, rehearsal, others, truth = world
    plain = spearmanr(model.predict(others), truth).statistic
    transfer, found = rehearse(make, rehearsal, 0)
    model.transfer = transfer
    try:
        predicted, difficulty = model.predict_with_difficulty(others)
        rehearsed = spearmanr(predicted, truth).statistic
        np.testing.assert_array_equal(predicted, model.predict(others))
        for row in (0, 7):  # alone in its batch
            assert model.predict(others.take(np.array([row])))[0] == pytest.approx(
                predicted[row], rel=1e-5
            )
    finally:
        model.transfer = None
    assert plain < 0.6 and rehearsed > 0.85
    assert (
        np.abs(predicted - truth).mean() < 0.6 * np.abs(truth - truth.mean()).mean()
    )  # on the score's scale
    # the figure that a user sees is about that of the other samples
    assert spearmanr(found.predicted, found.measured).statistic == pytest.approx(rehearsed, abs=0.1)
    assert (len(found), found.n_fit) == (100, 100) and np.isfinite(difficulty).all()
    np.testing.assert_array_equal(found.measured, rehearsal.measured)
    assert {"class_mean", "knn_published", "proxy_loss"} <= set(found.baselines)
    np.testing.assert_array_equal(
        found.baselines["proxy_loss"], rehearsal.nodes.signals[:, 0].astype(np.float64)
    )


def test_no_score_is_seen_by_its_own_prediction(world) -> None:
    make, _, rehearsal, _, _ = world
    _, found = rehearse(make, rehearsal, 0)
    noise = np.random.default_rng(5).normal(size=100)
    _, blind = rehearse(
        make, Rehearsal(rehearsal.fit_nodes, rehearsal.fit_score, rehearsal.nodes, noise), 0
    )
    assert abs(spearmanr(blind.predicted, noise).statistic) < 0.3
    # changing 20 of the scores leaves the predictions of just these 20 as they were
    from raypipe.assessment.held_out import split

    held = split(100, 0.2, 5, 0)[2]
    changed = rehearsal.measured.copy()
    changed[held] = changed[held][::-1] + 5
    _, again = rehearse(
        make, Rehearsal(rehearsal.fit_nodes, rehearsal.fit_score, rehearsal.nodes, changed), 0
    )
    np.testing.assert_array_equal(again.predicted[held], found.predicted[held])
    assert not np.array_equal(again.predicted, found.predicted)


def test_the_map_is_what_ridge_regression_on_normal_scores_gives() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(4000, 3))
    score = np.exp(2 * inputs[:, 0] - inputs[:, 1])  # a monotone function of a linear one
    transfer = Transfer.fit(np.exp(inputs), score)  # ranks do not change with the units of an input
    weights = transfer.weights / np.abs(transfer.weights).sum()
    np.testing.assert_allclose(weights, [2 / 3, -1 / 3, 0], atol=0.02)
    assert spearmanr(transfer(np.exp(inputs)), score).statistic > 0.99
    assert np.corrcoef(transfer(np.exp(inputs)), score)[0, 1] > 0.9
    assert transfer(np.exp(inputs)).mean() == pytest.approx(score.mean(), rel=0.02)


def test_inputs_that_say_nothing_and_scores_without_order() -> None:
    rng = np.random.default_rng(0)
    inputs, score = rng.normal(size=(50, 2)), rng.normal(size=50)
    inputs[:, 1] = np.nan
    transfer = Transfer.fit(np.c_[score, inputs], score)
    assert np.isfinite(transfer(np.full((3, 3), np.nan))).all()
    assert spearmanr(transfer(np.c_[score, inputs]), score).statistic > 0.99
    equal = Transfer.fit(inputs, np.full(50, 2.5))
    np.testing.assert_array_equal(equal(inputs[:4]), [2.5] * 4)
    with pytest.raises(RaypipeError, match=r"1 signals .* had 2"):
        equal.ranks(inputs[:, :1])


@pytest.mark.parametrize("constant", [False, True])
def test_a_map_is_restored_bit_for_bit(constant: bool) -> None:
    rng = np.random.default_rng(0)
    inputs, score = rng.normal(size=(60, 4)), np.ones(60) if constant else rng.normal(size=60)
    made = Transfer.fit(inputs, score)
    again = Transfer.from_tensors(made.tensors())
    np.testing.assert_array_equal(again(inputs), made(inputs))
    with pytest.raises(KeyError):
        Transfer.from_tensors(
            {name: value for name, value in made.tensors().items() if name != "weights"}
        )


def test_a_constant_score_is_rehearsed_too(world) -> None:
    make, _, rehearsal, _, _ = world
    transfer, found = rehearse(
        make, Rehearsal(rehearsal.fit_nodes, np.ones(100), rehearsal.nodes, np.ones(100)), 0
    )
    np.testing.assert_array_equal(found.predicted, np.ones(100))
    assert transfer.rising is None
