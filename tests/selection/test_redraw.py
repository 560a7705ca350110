"""Draws that are others in every epoch: exact counts, exact probabilities, unbiased weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.keeplists.infobatch import InfoBatch
from raypipe.selection import hash64
from raypipe.selection.redraw import draw, inclusion_probabilities, unbiased_weights

EPOCHS = 4000


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 7.0]), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.sampled_from([1.0, 3.0, 1000.0]),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_as_many_are_drawn_as_stated(
    scores: list[float], share: float, ratio: float, epoch: int
) -> None:
    score = np.array(scores, np.float32)
    count = max(1, round(share * len(score)))
    probability = inclusion_probabilities(score, count, ratio)
    assert probability.sum() == pytest.approx(count)
    assert (probability > 0).all() and (probability <= 1).all()
    order = np.argsort(score, kind="stable")
    assert (np.diff(probability[order]) >= -1e-12).all()
    rows = draw(hash64([f"s{row}" for row in range(len(score))]), probability, 3, epoch)
    assert len(rows) == count and len(np.unique(rows)) == count


def test_the_highest_score_is_as_much_likelier_as_stated() -> None:
    probability = inclusion_probabilities(np.arange(101.0), 20, 5.0)
    assert probability[-1] / probability[0] == pytest.approx(5)
    assert probability[50] / probability[0] == pytest.approx(5**0.5)
    assert inclusion_probabilities(np.arange(10.0), 4) == pytest.approx([0.4] * 10)
    # the highest would be drawn more than once: it is certain, and the others share the rest
    capped = inclusion_probabilities(np.array([0.0, 0.0, 1.0]), 2, 100.0)
    assert capped == pytest.approx([0.5, 0.5, 1.0])


@pytest.mark.parametrize("ratio", [1.0, 6.0])
def test_weighted_losses_are_unbiased_over_many_epochs(ratio: float) -> None:
    draw_numbers = np.random.default_rng(0)
    score = draw_numbers.normal(size=30)
    loss = np.exp(score)
    ids = [f"s{row}" for row in range(30)]
    probability = inclusion_probabilities(score, 9, ratio)
    weight, hashes = unbiased_weights(probability), hash64(ids)
    counts, means = np.zeros(30), []
    for epoch in range(EPOCHS):
        rows = draw(hashes, probability, 1, epoch)
        counts[rows] += 1
        means.append(float((weight[rows] * loss[rows]).mean()))
    error = np.sqrt(probability * (1 - probability) / EPOCHS)
    assert (np.abs(counts / EPOCHS - probability) < 4.5 * error).all()
    assert abs(np.mean(means) - loss.mean()) < 4 * np.std(means) / EPOCHS**0.5
    plain = np.mean([loss[draw(hashes, probability, 1, epoch)].mean() for epoch in range(400)])
    assert (abs(plain - loss.mean()) > 0.2 * loss.mean()) == (ratio > 1)


def test_draws_depend_on_ids_seed_and_epoch_and_not_on_the_order() -> None:
    ids = [f"s{row}" for row in range(200)]
    score = np.random.default_rng(1).normal(size=200)
    probability = inclusion_probabilities(score, 50, 3.0)
    kept = {ids[row] for row in draw(hash64(ids), probability, 0, 4)}
    order = np.random.default_rng(2).permutation(200)
    again = draw(hash64([ids[row] for row in order]), probability[order], 0, 4)
    assert {ids[order[row]] for row in again} == kept
    for seed, epoch in ((0, 5), (1, 4)):
        other = {ids[row] for row in draw(hash64(ids), probability, seed, epoch)}
        assert 20 < len(other - kept) < 50


def test_all_samples_are_seen_in_the_course_of_the_epochs() -> None:
    hashes, probability = hash64([f"s{row}" for row in range(100)]), np.full(100, 0.5)
    seen = np.unique(np.concatenate([draw(hashes, probability, 0, epoch) for epoch in range(12)]))
    assert len(seen) > 95


def test_infobatch_drops_half_of_those_below_the_mean_and_weights_the_others() -> None:
    infobatch, loss = InfoBatch(100), np.arange(100, dtype=np.float32)
    rows, weights = infobatch.choose(0, 0.0)
    assert rows.tolist() == list(range(100)) and (weights == 1).all()  # no loss is known
    infobatch.record(rows, loss)
    rows, weights = infobatch.choose(1, 0.1)
    low = rows < 50
    assert low.sum() == 25 and (weights[low] == 2).all()
    assert rows[~low].tolist() == list(range(50, 100)) and (weights[~low] == 1).all()
    assert weights.sum() == 100
    rows, weights = infobatch.choose(9, 0.875)  # the last eighth uses everything
    assert len(rows) == 100 and (weights == 1).all()


@pytest.mark.parametrize("drop", [0.3, 0.5, 0.9])
def test_infobatch_is_unbiased_over_many_epochs(drop: float) -> None:
    loss = np.random.default_rng(0).exponential(size=41).astype(np.float32)
    infobatch = InfoBatch(41, drop=drop, seed=2, ids=[f"s{row}" for row in range(41)])
    infobatch.record(np.arange(41), loss)
    other = np.random.default_rng(1).normal(size=41)  # what the gradient is, say
    sums = []
    for epoch in range(3000):
        rows, weights = infobatch.choose(epoch, 0.0)
        low = int((loss < loss.mean()).sum())
        assert len(rows) == 41 - int(drop * low)
        sums.append(float((weights * other[rows]).sum()))
    assert abs(np.mean(sums) - other.sum()) < 4 * np.std(sums) / 3000**0.5


def test_infobatch_refuses_what_makes_no_sense() -> None:
    for wrong in ({"drop": 1.0}, {"until": 1.5}, {"ids": ["a"]}):
        with pytest.raises(ConfigError, match="InfoBatch"):
            InfoBatch(10, **wrong)  # type: ignore[arg-type]
