"""Samples drawn from the extreme predictions sharpen figures, and do not bias them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from raypipe.assessment.extremes import ExtremeZone
from raypipe.assessment.fidelity import compare
from raypipe.assessment.held_out import ExtremePredictions, HeldOutPredictions


def population(count: int) -> HeldOutPredictions:
    """Predictions whose error grows with their distance from the median."""
    rng = np.random.default_rng(0)
    predicted = rng.standard_t(4, count)
    measured = predicted + (0.2 + 0.5 * np.abs(predicted)) * rng.normal(size=count)
    doubt = np.zeros((count, 4), np.float32)
    doubt[:, 0] = rng.gamma(4, 0.25, count)
    label, right = rng.integers(0, 4, count), np.abs(predicted) < 1
    return HeldOutPredictions(
        label, measured, predicted, doubt[:, 0], {"twice": 2 * predicted}, 9, "", doubt, right
    )


def take(data: HeldOutPredictions, rows: np.ndarray) -> HeldOutPredictions:
    assert data.doubt is not None and data.correct is not None
    return dataclasses.replace(
        data,
        label=data.label[rows],
        measured=data.measured[rows],
        predicted=data.predicted[rows],
        difficulty=data.difficulty[rows],
        baselines={name: values[rows] for name, values in data.baselines.items()},
        doubt=data.doubt[rows],
        correct=data.correct[rows],
    )


def draws(
    data: HeldOutPredictions, seed: int, random: int = 300, extremes: int = 100
) -> tuple[HeldOutPredictions, ExtremePredictions]:
    """A random draw, and one from the extreme predictions among the other samples."""
    order = np.random.default_rng(seed).permutation(len(data))
    zone = ExtremeZone.of(data.predicted[order[:random]])
    others = order[random:]
    for part in np.array_split(others, 3):  # as score shards are read
        zone = zone.count(data.predicted[part])
    inside = others[zone.contains(data.predicted[others])]
    assert zone.inside == len(inside) and zone.outside == len(others) - len(inside)
    return take(data, order[:random]), ExtremePredictions(take(data, inside[:extremes]), zone)


def test_weights_are_inverse_inclusion_probabilities() -> None:
    random = np.array([0.0, 1, -1, 2, -2, 3, -3, 4, -4, 50])
    zone = ExtremeZone.of(random)
    assert zone.contains(random).tolist() == [False] * 9 + [True]
    zone = zone.count(np.r_[np.zeros(90), np.full(7, 90.0), -np.full(2, 90.0)])
    assert (zone.inside, zone.outside) == (9, 90)
    # 9 of 99 samples were drawn outside the zone, and 1 + 4 of 10 inside
    weight = zone.weights(random, 4)
    assert weight.mean() == pytest.approx(1)
    assert weight[0] / weight[-1] == pytest.approx((99 / 9) / (10 / 5))
    assert len(set(weight[:9])) == len(set(weight[9:])) == 1
    assert ExtremeZone.from_dict(json.loads(json.dumps(zone.as_dict()))) == zone


def test_weighted_figures_are_those_of_all_samples() -> None:
    data = population(20_000)
    found = [
        compare(random, seed, (0.3,), 0.9, extremes=extremes)
        for seed, (random, extremes) in enumerate(draws(data, seed) for seed in range(40))
    ]
    residual = data.measured - data.predicted
    top = set(np.argsort(data.measured)[-6000:]) & set(np.argsort(data.predicted)[-6000:])
    within = np.mean(
        [
            spearmanr(data.predicted[rows], data.measured[rows]).statistic
            for rows in (data.label == label for label in range(4))
        ]
    )
    assert data.correct is not None
    for name, truth, tolerance in (
        ("rmse", np.sqrt(np.square(residual).mean()), 0.03),
        ("spread", data.measured.std(), 0.03),
        ("pearson", pearsonr(data.predicted, data.measured).statistic, 0.01),
        ("spearman", spearmanr(data.predicted, data.measured).statistic, 0.01),
        ("spearman_within", within, 0.015),
        ("proxy_accuracy", data.correct.mean(), 0.01),
    ):
        assert np.mean([getattr(each, name) for each in found]) == pytest.approx(
            truth, abs=tolerance
        ), name
    assert np.mean([each.overlap[0.3] for each in found]) == pytest.approx(
        len(top) / 6000, abs=0.01
    )
    coverage = [each.coverage for each in found if each.coverage is not None]
    assert len(coverage) == 40
    assert np.mean([each.overall for each in coverage]) == pytest.approx(0.9, abs=0.012)
    assert np.mean([each.extreme for each in coverage]) == pytest.approx(0.9, abs=0.025)
    assert {(each.n_held, each.n_extremes) for each in found} == {(300, 100)}
    assert np.mean([each.n_extreme for each in coverage]) > 100
    assert np.mean([each.n_farthest for each in coverage]) == pytest.approx(40, abs=2)
    truth = float(np.mean([each.spearman or 0 for each in found]))
    bounds = [each.spearman_interval or (0, 0) for each in found]
    assert sum(low <= truth <= high for low, high in bounds) >= 34


def test_extremes_make_the_error_more_certain() -> None:
    data = population(20_000)
    pairs = [draws(data, seed) for seed in range(40)]
    alone = [compare(random, 0, ()).rmse for random, _ in pairs]
    joined = [compare(random, 0, (), extremes=extremes).rmse for random, extremes in pairs]
    assert np.std(joined) < 0.75 * np.std(alone)


def test_simpler_predictions_are_compared_on_the_random_draw() -> None:
    """They are not predicted for the extremes."""
    data = population(5000)
    random, extremes = draws(data, 1)
    bare = dataclasses.replace(extremes.predictions, baselines={})
    joined = compare(random, 0, (0.5,), extremes=dataclasses.replace(extremes, predictions=bare))
    alone = compare(random, 0, (0.5,))
    assert joined.baselines == alone.baselines
    assert joined.pearson != alone.pearson


def test_without_extremes_nothing_is_weighted() -> None:
    random, extremes = draws(population(5000), 2)
    none = dataclasses.replace(extremes, predictions=take(extremes.predictions, np.arange(0)))
    alone, joined = compare(random, 0, confidence=0.9), compare(random, 0, (0.3, 0.5, 0.7), 0.9)
    assert joined == alone and alone.n_extremes == 0
    assert compare(random, 0, extremes=none).n_extremes == 0
