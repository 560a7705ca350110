from __future__ import annotations

import json

import numpy as np
import pytest
from split_conformal import fit, stretched

from raypipe.assessment.conformal import Conformal
from raypipe.errors import RaypipeError
from raypipe.extrapolators.published.knn import KnnPublished


def test_coverage_on_fresh_samples() -> None:
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        difficulty = rng.gamma(4, 0.25, count)
        # heavy tails and another scale than assumed: coverage holds anyway
        return rng.standard_t(5, count) * (0.2 + difficulty), difficulty

    interval = fit(*draw(4000), 0.9)
    residual, difficulty = draw(20000)
    assert 0.88 < (np.abs(residual) <= interval.half_width(difficulty)).mean() < 0.92


def test_coverage_around_an_extrapolator(problem, settings) -> None:
    nodes, score = problem(9000, noise=0.3)
    knn = KnnPublished(settings("knn-published"), 4)
    knn.fit(nodes.take(np.arange(1000)), score[:1000])
    residual, difficulty = score - knn.predict(nodes), knn.difficulty(nodes)
    interval = fit(residual[1000:4000], difficulty[1000:4000], 0.9)
    assert 0.88 < (np.abs(residual[4000:]) <= interval.half_width(difficulty[4000:])).mean() < 0.92


def _classes(
    rng: np.random.Generator, count: int, unseen: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals whose scale and shape differ by class, difficulties and labels.

    `unseen` multiplies the residuals, those of class 3 a little more.
    """
    label, difficulty = rng.integers(0, 10, count), rng.gamma(4, 0.25, count)
    scale = 2.0 ** (label / 3) * np.where(label == 3, unseen**1.05, unseen)
    return (
        np.where(label < 5, rng.normal(size=count), rng.exponential(size=count) - 1)
        * scale
        * (0.3 + difficulty),
        difficulty,
        label,
    )


def _covered(
    interval: Conformal, residual: np.ndarray, difficulty: np.ndarray, label: np.ndarray
) -> list[float]:
    """Share of the samples inside their interval, overall and in each class."""
    inside = np.abs(residual) <= interval.half_width(difficulty, label)
    return [inside.mean(), *(inside[label == known].mean() for known in range(10))]


def test_coverage_overall_and_of_every_class() -> None:
    rng = np.random.default_rng(0)
    calibration, fresh = _classes(rng, 40_000, 1.0), _classes(rng, 60_000, 1.0)
    by_class = fit(*calibration[:2], 0.9, calibration[2])
    assert len(by_class.of_class) == 10
    assert all(0.88 < share < 0.92 for share in _covered(by_class, *fresh))
    overall, *classes = _covered(fit(*calibration[:2], 0.9), *fresh)
    assert 0.88 < overall < 0.92 and min(classes) < 0.8, "without classes it holds on average only"


def test_an_audit_set_corrects_for_a_seed_set_that_the_proxy_was_trained_on() -> None:
    rng = np.random.default_rng(1)
    seed, audit, fresh = (
        _classes(rng, 40_000, 0.6),
        _classes(rng, 4000, 1.0),
        _classes(rng, 60_000, 1.0),
    )
    held_out = fit(*seed[:2], 0.9, seed[2])
    assert _covered(held_out, *fresh)[0] < 0.8
    both = stretched(held_out, *audit)
    assert both.stretch == pytest.approx(1 / 0.6, rel=0.1) and both.stretch_count == 4000
    assert all(0.88 < share < 0.92 for share in _covered(both, *fresh))
    assert stretched(held_out, *(values[:99] for values in audit)) is held_out, "too few to decide"
    assert stretched(fit(*(values[:5] for values in seed[:2]), 0.9), *audit).count == 4000
    nothing = stretched(fit(np.zeros(200), np.ones(200), 0.9), np.ones(200), np.ones(200))
    assert nothing.half_width(np.ones(1)) == pytest.approx(1)


def test_small_classes_share_a_quantile() -> None:
    residual, label = (
        np.r_[np.full(200, 1.0), np.full(29, 5.0), np.full(29, 9.0)],
        np.repeat([0, 1, -1], [200, 29, 29]),
    )
    interval = fit(residual, np.zeros(258), 0.8, label)
    assert interval.of_class == {0: 1.0}
    assert interval.half_width(np.zeros(4), np.array([0, 1, -1, 7])).tolist() == [1, 9, 9, 9]
    alone = fit(residual[:200], np.zeros(200), 0.8, label[:200])
    assert alone.half_width(np.zeros(1), np.array([5])).tolist() == [1], (
        "a class without residuals gets the shared quantile"
    )


def test_intervals_are_wider_far_from_every_scored_sample(problem, settings) -> None:
    nodes, score = problem(600)
    knn = KnnPublished(settings("knn-published"), 4)
    knn.fit(nodes.take(np.arange(300)), score[:300])
    interval = fit((score - knn.predict(nodes))[300:], knn.difficulty(nodes)[300:], 0.9)
    far = type(nodes)(nodes.embedding[300:] * 4, nodes.label[300:], nodes.signals[300:])
    near, away = (
        interval.half_width(knn.difficulty(part)) for part in (nodes.take(np.arange(300, 600)), far)
    )
    assert (away > near).mean() > 0.95 and np.median(away) > 2 * np.median(near)


def test_coverage_holds_for_few_samples_on_average() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(3000):
        interval = fit(rng.normal(size=19), np.ones(19), 0.9)
        covered.append(abs(rng.normal()) <= interval.half_width(np.ones(1))[0])
    # With 19 samples the corrected rank, ceil(20 * 0.9) = 18, covers 18 / 20 exactly. The
    # uncorrected rank of 17.1 would cover less.
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)


def test_rank_and_scaling() -> None:
    interval = fit(np.array([-1.0, 2, -3, 4, -5, 6, -7, 8, -9]), np.ones(9), 0.9)
    assert (
        interval.quantile == pytest.approx(9 / 2) and interval.count == 9
    )  # ceil(10 * 0.9) = 9, the largest
    np.testing.assert_allclose(interval.half_width(np.array([0.0, 1.0, 3.0])), [4.5, 9.0, 18.0])


def test_too_few_residuals_give_no_bound() -> None:
    interval = fit(np.ones(8), np.ones(8), 0.9)
    assert interval.quantile is None and np.isinf(interval.half_width(np.ones(3))).all()
    assert fit(np.ones(0), np.ones(0), 0.9).quantile is None


def test_intervals_of_older_runs_are_read() -> None:
    state = {
        "quantile": 2.0,
        "confidence": 0.9,
        "count": 300,
        "of_class": {"4": 1.0, "5": 3.0},
        "stretch": 0.5,
        "stretch_count": 100,
    }
    interval = Conformal.from_state(json.loads(json.dumps(state)))
    difficulty, label = np.array([0.0, 1.0, 1.0]), np.array([4, 5, -1])
    assert interval.half_width(difficulty, label).tolist() == [0.5, 3.0, 2.0]
    doubt = np.stack([difficulty, np.full(3, 9.0)], 1)
    assert interval.around(np.zeros(3), doubt, label).tolist() == [0.5, 3.0, 2.0]


def test_wrong_residuals_are_refused() -> None:
    with pytest.raises(RaypipeError, match="do not match"):
        fit(np.ones(3), np.ones(2), 0.9)
    with pytest.raises(RaypipeError, match="finite"):
        fit(np.array([1, np.nan]), np.ones(2), 0.9)
    with pytest.raises(RaypipeError, match="at least 0"):
        fit(np.ones(2), -np.ones(2), 0.9)
