from __future__ import annotations

import json

import numpy as np
import pytest

from raypipe.errors import RaypipeError
from raypipe.extrapolate.conformal import Conformal
from raypipe.extrapolate.knn_published import KnnPublished


def test_coverage_on_fresh_samples() -> None:
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        difficulty = rng.gamma(4, 0.25, count)
        return rng.standard_t(5, count) * (0.2 + difficulty), difficulty  # wrong shape and wrong scale: validity needs neither

    interval = Conformal.fit(*draw(4000), 0.9)
    residual, difficulty = draw(20000)
    assert 0.88 < (np.abs(residual) <= interval.half_width(difficulty)).mean() < 0.92


def test_coverage_around_an_extrapolator(problem, settings) -> None:
    nodes, score = problem(9000, noise=0.3)
    knn = KnnPublished(settings("knn-published"), 4)
    knn.fit(nodes.take(np.arange(1000)), score[:1000])
    residual, difficulty = score - knn.predict(nodes), knn.difficulty(nodes)
    interval = Conformal.fit(residual[1000:4000], difficulty[1000:4000], 0.9)
    assert 0.88 < (np.abs(residual[4000:]) <= interval.half_width(difficulty[4000:])).mean() < 0.92


def test_coverage_holds_for_few_samples_on_average() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(3000):
        interval = Conformal.fit(rng.normal(size=19), np.ones(19), 0.9)
        covered.append(abs(rng.normal()) <= interval.half_width(np.ones(1))[0])
    # with 19 samples the corrected rank, ceil(20 * 0.9) = 18, covers 18 / 20 exactly; the uncorrected 17.1th would cover less
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)


def test_rank_and_scaling() -> None:
    interval = Conformal.fit(np.array([-1.0, 2, -3, 4, -5, 6, -7, 8, -9]), np.ones(9), 0.9)
    assert interval.quantile == pytest.approx(9 / 2) and interval.count == 9  # ceil(10 * 0.9) = 9, the largest
    np.testing.assert_allclose(interval.half_width(np.array([0.0, 1.0, 3.0])), [4.5, 9.0, 18.0])


def test_too_few_residuals_give_no_bound() -> None:
    interval = Conformal.fit(np.ones(8), np.ones(8), 0.9)
    assert interval.quantile is None and np.isinf(interval.half_width(np.ones(3))).all()
    assert Conformal.fit(np.ones(0), np.ones(0), 0.9).quantile is None


def test_state_and_errors() -> None:
    interval = Conformal.fit(np.arange(30.0), np.ones(30), 0.8)
    assert Conformal.from_state(json.loads(json.dumps(interval.state(), allow_nan=False))) == interval
    with pytest.raises(RaypipeError, match="do not match"):
        Conformal.fit(np.ones(3), np.ones(2), 0.9)
    with pytest.raises(RaypipeError, match="finite"):
        Conformal.fit(np.array([1, np.nan]), np.ones(2), 0.9)
    with pytest.raises(RaypipeError, match="at least 0"):
        Conformal.fit(np.ones(2), -np.ones(2), 0.9)
