"""Intervals hold overall, for the most extreme predictions and for the farthest samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
from split_conformal import fit

from raypipe.assessment.intervals import Calibration, Intervals, cross_coverage
from raypipe.errors import RaypipeError


def draw(rng: np.random.Generator, count: int, unseen: float = 1.0) -> Calibration:
    """Samples whose residuals grow with the distance, the disagreement and the prediction.

    `unseen` multiplies the residuals of samples with a large error of the proxy.
    """
    distance, disagreement = rng.gamma(4, 0.25, count), rng.exponential(0.3, count)
    error = rng.exponential(0.5, count) * unseen
    predicted = rng.standard_t(4, count)
    sigma = 0.1 + 0.1 * distance**2 + disagreement + 0.2 * np.abs(predicted) + 0.3 * error
    doubt = np.stack([distance, np.zeros(count), error, disagreement], 1)
    return Calibration(rng.normal(size=count) * sigma, predicted, doubt, rng.integers(0, 5, count))


def covered(intervals: Intervals, data: Calibration) -> tuple[float, float, float]:
    """Coverage overall, in the tenth of most extreme predictions, and in the farthest tenth."""
    inside = np.abs(data.residual) <= intervals.around(data.predicted, data.doubt, data.label)
    tenth = len(data) // 10
    extreme = np.argsort(-np.abs(data.predicted - np.median(data.predicted)))[:tenth]
    far = np.argsort(-data.doubt[:, 0])[:tenth]
    return inside.mean(), inside[extreme].mean(), inside[far].mean()


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_coverage_holds_in_the_extremes(confidence: float) -> None:
    rng = np.random.default_rng(0)
    fresh = draw(rng, 20_000)
    shares = np.mean(
        [covered(Intervals.fit(draw(rng, 1500), confidence), fresh) for _ in range(10)], 0
    )
    assert np.abs(shares - confidence).max() < 0.02
    # intervals by distance alone miss the extreme predictions
    known = draw(rng, 1500)
    before = fit(known.residual, known.doubt[:, 0], confidence)
    inside = np.abs(fresh.residual) <= before.half_width(fresh.doubt[:, 0])
    extreme = np.argsort(-np.abs(fresh.predicted))[:2000]
    assert inside[extreme].mean() < confidence - 0.05


def test_audit_samples_correct_a_memorised_seed_set() -> None:
    """Held-out seed samples have small errors and residuals; other samples have not."""
    rng = np.random.default_rng(1)
    fresh, shares, without = draw(rng, 20_000, unseen=5), [], []
    for _ in range(20):
        seed, audit = draw(rng, 600, unseen=0.01), draw(rng, 100, unseen=5)
        shares.append(covered(Intervals.fit(seed, 0.9, audit), fresh))
        without.append(covered(Intervals.fit(seed, 0.9), fresh))
    assert np.abs(np.mean(shares, 0) - 0.9).max() < 0.02
    assert np.mean(without, 0)[0] < 0.82


def test_an_interval_grows_with_every_doubt() -> None:
    rng = np.random.default_rng(2)
    intervals = Intervals.fit(draw(rng, 2000), 0.9)
    predicted, label = np.zeros(1), np.zeros(1, int)
    base = intervals.around(predicted, np.zeros((1, 4)), label)[0]
    assert base > 0
    for column in (0, 2, 3):
        doubt = np.zeros((1, 4))
        doubt[0, column] = 2.0
        assert intervals.around(predicted, doubt, label)[0] > 1.2 * base
    assert intervals.around(np.full(1, 8.0), np.zeros((1, 4)), label)[0] > 1.2 * base


def test_a_class_with_larger_residuals_has_wider_intervals() -> None:
    rng = np.random.default_rng(3)
    data = draw(rng, 3000)
    data.residual[data.label == 2] *= 4
    intervals = Intervals.fit(data, 0.9)
    assert set(intervals.of_class) == set(range(5))
    fresh = draw(rng, 20_000)
    fresh.residual[fresh.label == 2] *= 4
    inside = np.abs(fresh.residual) <= intervals.around(fresh.predicted, fresh.doubt, fresh.label)
    for label in range(5):
        assert inside[fresh.label == label].mean() == pytest.approx(0.9, abs=0.04)
    # of few samples, a class has less to say
    factor = [Intervals.fit(data.take(np.arange(count)), 0.9).of_class[2] for count in (30, 3000)]
    assert 1.2 < factor[0] < factor[1]
    assert 3 < factor[1] / intervals.of_class[0] < 5
    unknown = intervals.around(np.zeros(2), np.zeros((2, 4)), np.array([7, -1]))
    of_each = intervals.around(np.zeros(5), np.zeros((5, 4)), np.arange(5))
    assert of_each[0] < unknown[0] == unknown[1] < of_each[2]


def test_few_samples_have_infinite_intervals_and_equal_ones_none() -> None:
    rng = np.random.default_rng(4)
    few = Intervals.fit(draw(rng, 8), 0.9)
    assert few.quantile is None
    assert np.isinf(few.around(np.zeros(3), np.zeros((3, 4)), np.zeros(3, int))).all()
    nothing = draw(rng, 0)
    assert Intervals.fit(nothing, 0.9).quantile is None
    data = draw(rng, 50)
    exact = Intervals.fit(Calibration(np.zeros(50), data.predicted, data.doubt, data.label), 0.9)
    assert exact.around(data.predicted, data.doubt, data.label).max() == 0


def test_state_is_json_and_restores_the_intervals() -> None:
    rng = np.random.default_rng(5)
    for intervals in (
        Intervals.fit(draw(rng, 500), 0.9, draw(rng, 60)),
        Intervals.fit(draw(rng, 3), 0.9),
    ):
        state = json.loads(json.dumps(intervals.state(), allow_nan=False))
        assert Intervals.from_state(state) == intervals


def test_unusable_input_is_refused() -> None:
    data = draw(np.random.default_rng(6), 30)
    with pytest.raises(RaypipeError, match="do not match"):
        Calibration(data.residual[:5], data.predicted, data.doubt, data.label)
    with pytest.raises(RaypipeError, match="finite"):
        Calibration(np.full(30, np.nan), data.predicted, data.doubt, data.label)
    with pytest.raises(RaypipeError, match="at least 0"):
        Calibration(data.residual, data.predicted, -data.doubt, data.label)
    narrow = Calibration(data.residual, data.predicted, data.doubt[:, :2], data.label)
    with pytest.raises(RaypipeError, match="different numbers"):
        Intervals.fit(data, 0.9, narrow)


def test_cross_coverage_leaves_each_sample_out_of_its_own_calibration() -> None:
    rng = np.random.default_rng(7)
    seed, audit = draw(rng, 1000), draw(rng, 400)
    for inside in (cross_coverage(seed, 0.9, 0), cross_coverage(seed, 0.9, 0, audit)):
        assert inside.mean() == pytest.approx(0.9, abs=0.04)
    assert len(cross_coverage(seed, 0.9, 0, audit)) == 400
    assert len(cross_coverage(draw(rng, 0), 0.9, 0)) == 0


def test_extremes_of_a_class_with_wide_intervals_are_covered_as_often_as_all() -> None:
    """Extreme predictions are mostly those of one class, whose other errors are larger."""
    rng = np.random.default_rng(8)

    def with_a_class(count: int) -> Calibration:
        label = rng.integers(0, 10, count)
        predicted = rng.normal(size=count) + 2 * (label == 7)
        doubt = np.zeros((count, 4))
        doubt[:, 0] = rng.gamma(4, 0.25, count)
        sigma = 1 + 2 * ((label == 7) & (predicted < 2.0))
        return Calibration(rng.normal(size=count) * sigma, predicted, doubt, label)

    fresh = with_a_class(20_000)
    shares = [covered(Intervals.fit(with_a_class(600), 0.9), fresh) for _ in range(20)]
    assert np.abs(np.mean(shares, 0) - 0.9).max() < 0.015
