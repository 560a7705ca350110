from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from raypipe.assessment import rank_agreement as module
from raypipe.assessment.fidelity import Fidelity, compare
from raypipe.assessment.held_out import (
    MLP_EPOCHS,
    HeldOutPredictions,
    hold_out,
    predict,
    split,
)
from raypipe.assessment.intervals import Intervals
from raypipe.assessment.rank_agreement import chance, spearman
from raypipe.errors import RaypipeError
from raypipe.extrapolators import make
from raypipe.extrapolators.base import Nodes


def pair(
    predicted: np.ndarray, measured: np.ndarray, **baselines: np.ndarray
) -> HeldOutPredictions:
    """Held-out predictions without samples."""
    n = len(measured)
    return HeldOutPredictions(
        np.zeros(n, np.int64), measured, predicted, np.ones(n, np.float32), baselines, n_fit=5
    )


def judge(
    make_it: Any, nodes: Nodes, score: np.ndarray, holdout: float, seed: int, **more: Any
) -> tuple[HeldOutPredictions, Fidelity]:
    """Hold out one part of the seed set and assess its predictions."""
    found = hold_out(make_it, nodes, score, split(len(nodes), holdout, 1, seed)[0], **more)
    return found, compare(found, seed)


def test_figures_by_hand() -> None:
    rng = np.random.default_rng(0)
    measured = rng.normal(size=200)
    predicted = np.round(measured + rng.normal(size=200), 1)  # with ties
    found = compare(pair(predicted, measured, other=-measured), 0, (0.3, 0.75))
    assert found.spearman == pytest.approx(spearmanr(predicted, measured).statistic)
    assert found.pearson == pytest.approx(pearsonr(predicted, measured).statistic)
    untied = predicted + 1e-9 * rng.normal(size=200)
    top = set(np.argsort(untied)[-60:]) & set(np.argsort(measured)[-60:])
    assert compare(pair(untied, measured), 0).overlap[0.3] == pytest.approx(len(top) / 60)
    np.testing.assert_allclose(pair(predicted, measured).residual, measured - predicted)
    # every baseline has the same figures, under the same resamples
    assert set(found.overlap) == set(found.overlap_interval) == {0.3, 0.75}
    other = found.baselines["other"]
    assert other.spearman == pytest.approx(-1) and other.pearson_interval == pytest.approx((-1, -1))
    assert set(other.overlap_interval) == {0.3, 0.75} and other.overlap[0.3] == 0
    assert found.as_dict()["baselines"]["other"]["overlap"] == {
        "0.3": 0.0,
        "0.75": pytest.approx(2 / 3, abs=0.01),
    }


def test_bootstrap_equals_the_obvious_loop(monkeypatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 20)
    monkeypatch.setattr(module, "CHUNK_VALUES", 40 * 7)
    rng = np.random.default_rng(3)
    measured = rng.normal(size=40)
    predicted = np.round(measured + rng.normal(size=40), 1)
    found = module._resample({"": module._ScorePair(predicted, measured, 0)}, np.ones(40), 9, ())[
        ""
    ]
    again = np.random.default_rng(9)
    drawn = np.concatenate(
        [again.integers(0, 40, (min(7, 20 - start), 40)) for start in range(0, 20, 7)]
    )
    np.testing.assert_allclose(
        found["spearman"], [spearmanr(predicted[rows], measured[rows]).statistic for rows in drawn]
    )
    np.testing.assert_allclose(
        found["pearson"], [pearsonr(predicted[rows], measured[rows]).statistic for rows in drawn]
    )


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 1.5)])
def test_resamples_do_not_depend_on_the_size_of_the_chunks(
    monkeypatch: pytest.MonkeyPatch, weights: tuple[float, ...]
) -> None:
    weight = np.repeat(weights, 15)
    drawn = []
    for rows in (1, 7, 1000):
        monkeypatch.setattr(module, "CHUNK_VALUES", len(weight) * rows)
        drawn.append(np.concatenate(list(module.resample_weights(weight, 3))))
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == drawn[2]).all()


def test_overlap_of_a_resample_counts_repeats() -> None:
    a, b = np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3])
    pair = module._ScorePair(a, b, 0)
    # drawn: the third pair three times, the fourth once; the top 2 are 4, 3 by a and 3, 3 by b
    assert pair.overlaps(np.array([[0.0, 0, 3, 1]]), [0.5]) == {0.5: pytest.approx([0.5])}
    once = pair.overlaps(np.ones((1, 4)), [0.5, 0.25])
    assert once == {0.5: pytest.approx([1.0]), 0.25: pytest.approx([0.0])}


def test_a_resample_of_equal_values_has_no_correlation() -> None:
    a, b = np.array([1.0, 1, 1, 5]) / 3, np.array([1.0, 2, 3, 4])
    pair = module._ScorePair(a, b, 0)
    without_the_last = np.array([[2.0, 1, 1, 0]])
    assert np.isnan(pair.pearson(without_the_last)).all()
    assert np.isnan(pair.spearman(without_the_last)).all()


def test_intervals_cover_the_truth() -> None:
    rng, inside = np.random.default_rng(0), 0
    for trial in range(40):
        a = rng.normal(size=150)
        b = 0.6 * a + 0.8 * rng.normal(size=150)
        interval = compare(pair(a, b), trial, ()).spearman_interval
        assert interval is not None
        inside += (
            interval[0] <= 6 / np.pi * np.arcsin(0.3) <= interval[1]
        )  # Spearman of a Gaussian pair with correlation 0.6
    assert inside >= 33


def test_ties_are_broken_alike_on_both_sides() -> None:
    """Two independent halves overlap at the cut as their keep-lists do."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 4000).astype(float), rng.integers(0, 2, 4000).astype(float)
    assert compare(pair(a, b), 0).overlap[0.3] == pytest.approx(0.5, abs=0.04)
    for fraction, share in compare(pair(b, b), 0).overlap.items():
        assert share == 1, fraction


def test_ceilings_are_what_a_perfect_prediction_without_ties_reaches() -> None:
    rng = np.random.default_rng(0)
    measured = rng.permutation(np.repeat([0.0, 1.0, 2.0], [900, 80, 20]))
    found = module.ceiling(measured, (0.05, 0.3, 0.5))
    assert found.spearman == pytest.approx(0.52, abs=0.005)
    assert found.overlap[0.3] == pytest.approx(0.48, abs=0.005)
    best = [measured + 1e-3 * rng.random(1000) for _ in range(16)]
    agreement = [compare(pair(predicted, measured), 0, (0.05, 0.3, 0.5)) for predicted in best]
    assert np.mean([each.spearman for each in agreement]) == pytest.approx(found.spearman, abs=0.01)
    for fraction, share in found.overlap.items():
        reached = np.mean([each.overlap[fraction] for each in agreement])
        assert reached == pytest.approx(share, abs=0.01)
    assert agreement[0].ceiling == found
    untied = module.ceiling(rng.normal(size=200), (0.3,))
    assert untied.spearman == 1 and untied.overlap == {0.3: 1}
    assert module.ceiling(np.ones(20), (0.3,)).spearman is None


def _in_classes(classes: int, each: int, seed: int) -> HeldOutPredictions:
    """Scores that agree to Spearman 0.79 within classes, whose means differ widely and agree."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(classes), each)
    own = rng.normal(size=len(label))
    other = 0.8 * own + 0.6 * rng.normal(size=len(label))
    mean = 5 * rng.normal(size=classes)[label]
    return dataclasses.replace(pair(own + mean, other + mean), label=label)


@pytest.mark.parametrize(("classes", "each"), [(4, 100), (40, 10), (150, 3)])
def test_correlation_within_classes_does_not_count_differences_between_them(
    classes: int, each: int
) -> None:
    truth = 6 / np.pi * np.arcsin(0.4)
    found = [compare(_in_classes(classes, each, seed), seed, ()) for seed in range(15)]
    assert min(each.spearman or 0 for each in found) > 0.9
    assert np.mean([each.spearman_within for each in found]) == pytest.approx(truth, abs=0.02)
    intervals = [each.spearman_within_interval or (0, 0) for each in found]
    assert sum(low <= truth <= high for low, high in intervals) >= 12
    assert json.loads(json.dumps(found[0].as_dict()))["spearman_within"] == found[0].spearman_within


def test_without_classes_there_is_no_correlation_within_them() -> None:
    data = _in_classes(4, 25, 0)
    nothing = dataclasses.replace(data, label=np.full(100, -1))
    assert compare(nothing, 0).spearman_within is None


def test_error_spread_and_coverage() -> None:
    rng = np.random.default_rng(0)
    measured = rng.normal(size=2000)
    data = pair(measured + 0.3 * rng.normal(size=2000), measured)
    found = compare(data, 0, (), 0.9)
    assert found.rmse == pytest.approx(0.3, abs=0.02)
    assert found.spread == pytest.approx(1, abs=0.05)
    assert found.coverage is not None
    assert (found.coverage.n, found.coverage.n_extreme, found.coverage.confidence) == (
        2000,
        200,
        0.9,
    )
    assert found.coverage.overall == pytest.approx(0.9, abs=0.02)
    assert found.coverage.extreme == pytest.approx(0.9, abs=0.06)
    assert found.coverage.farthest == pytest.approx(0.9, abs=0.06)
    few = compare(pair(measured[:12], measured[:12] ** 2), 0, (), 0.95)
    assert few.coverage is None  # too few for an interval
    assert compare(data, 0, ()).coverage is None


def test_accuracy_of_the_proxy() -> None:
    rng = np.random.default_rng(0)
    data = dataclasses.replace(
        pair(*rng.normal(size=(2, 40))),
        label=np.repeat([0, 1, 2, -1], 10),
        correct=np.tile([True, False], 20),
    )
    found = compare(data, 0)
    assert (found.proxy_accuracy, found.proxy_chance) == (0.5, pytest.approx(1 / 3))
    assert found.proxy_balanced == {
        "accuracy": 0.5,
        "chance": pytest.approx(1 / 3),
        "error": pytest.approx(np.sqrt(2 / 9 / 30)),  # of the mean of 30 balanced guesses
    }
    assert compare(dataclasses.replace(data, correct=None), 0).proxy_accuracy is None


@pytest.mark.parametrize("case", ["few", "constant measured", "constant predicted", "none"])
def test_undefined_is_none_with_a_reason(case: str) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    if case == "few":
        a, b = a[:9], b[:9]
    elif case == "constant measured":
        b = np.full(50, 0.1)
    elif case == "constant predicted":
        a = np.full(50, 0.1)
    elif case == "none":
        a, b = a[:0], b[:0]
    found = compare(pair(a, b), 0)
    assert (
        found.spearman is None
        and found.pearson is None
        and found.spearman_interval is None
        and found.note
    )
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_random_order_is_what_random_orders_give() -> None:
    rng, n = np.random.default_rng(0), 80
    measured, found = rng.normal(size=n), chance(n, (0.3,))
    drawn = [rng.normal(size=n) for _ in range(600)]
    low, high = found.spearman_interval or (0, 0)
    assert np.mean(
        [low <= spearmanr(row, measured).statistic <= high for row in drawn]
    ) == pytest.approx(0.95, abs=0.03)
    top = set(np.argsort(measured)[-24:])
    shares = [len(top & set(np.argsort(row)[-24:])) / 24 for row in drawn]
    assert found.overlap[0.3] == pytest.approx(np.mean(shares), abs=0.02)
    low, high = found.overlap_interval[0.3]
    assert np.mean([low <= share <= high for share in shares]) >= 0.93


def test_with_very_many_samples_there_are_fewer_resamples(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_DRAWS", 50 * 300)
    monkeypatch.setattr(module, "MIN_RESAMPLES", 20)
    values = np.random.default_rng(0).normal(size=50)
    assert len(module.spearman_of_resamples({"a": values}, values, 0)["a"]) == 300
    long = np.random.default_rng(0).normal(size=5000)
    assert len(module.spearman_of_resamples({"a": long}, long, 0)["a"]) == 20


def test_parts_are_disjoint_and_cover_the_seed_set() -> None:
    parts = split(203, 0.2, 5, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(203))
    assert {len(part) for part in parts} <= {40, 41}
    np.testing.assert_array_equal(split(203, 0.2, 1, seed=3)[0], parts[0])
    assert (split(203, 0.2, 1, seed=4)[0] != parts[0]).any()


def test_every_sample_is_predicted_by_a_fit_without_it(problem, settings) -> None:
    nodes, score = problem(150)
    make_it = lambda: make(settings("knn-published"), 4)  # noqa: E731
    parts = [hold_out(make_it, nodes, score, held) for held in split(150, 0.2, 5, 0)]
    found, rows = HeldOutPredictions.concat(parts), np.concatenate(split(150, 0.2, 5, 0))
    assert (len(found), found.n_fit) == (150, 120)
    np.testing.assert_array_equal(found.measured, score[rows])
    np.testing.assert_array_equal(found.label, nodes.label[rows])
    alone = make_it()
    alone.fit(
        nodes.take(np.setdiff1d(np.arange(150), rows[:30])),
        score[np.setdiff1d(np.arange(150), rows[:30])],
    )
    np.testing.assert_array_equal(
        found.predicted[:30], alone.predict(nodes.take(rows[:30])).astype(np.float64)
    )
    assert set(found.baselines) == {"class_mean", "knn_published", "mlp", "proxy", "proxy_loss"}
    few = HeldOutPredictions.concat(
        [parts[0], pair(np.zeros(3), np.ones(3), class_mean=np.zeros(3))]
    )
    assert set(few.baselines) == {"class_mean"} and few.n_fit == 5
    with pytest.raises(RaypipeError, match="no predictions"):
        HeldOutPredictions.concat([])


def test_judge_splits_fits_and_compares(problem, settings) -> None:
    nodes, score = problem(300)
    held, found = judge(lambda: make(settings("gnn", epochs=2), 4), nodes, score, 0.2, 1)
    assert (found.n_fit, found.n_held, len(held), len(held.difficulty)) == (240, 60, 60, 60)
    assert found.note == "" and found.spearman is not None and found.spearman > 0.7
    assert (
        found.spearman_interval is not None
        and found.spearman_interval[0] < found.spearman < found.spearman_interval[1]
    )
    again = judge(lambda: make(settings("gnn", epochs=2), 4), nodes, score, 0.2, 1)[1]
    assert again.as_dict() == found.as_dict()
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert set(data["overlap"]) == {"0.3", "0.5", "0.7"} and data["n_held"] == 60
    data = held.calibration()
    width = Intervals.fit(data, 0.9).around(data.predicted, data.doubt, data.label)
    assert np.isfinite(width).all()


def test_held_out_scores_do_not_reach_the_fit(problem, settings) -> None:
    nodes, score = problem(200)
    held, changed = split(200, 0.2, 1, 1)[0], score.copy()
    changed[held] = 1000 + np.random.default_rng(0).normal(size=40)
    make_it = lambda: make(settings("gnn", epochs=2), 4)  # noqa: E731
    first, second = (hold_out(make_it, nodes, values, held) for values in (score, changed))
    np.testing.assert_array_equal(first.predicted, second.predicted)
    for name, value in first.baselines.items():
        np.testing.assert_array_equal(value, second.baselines[name])


def test_baselines(problem, settings) -> None:
    nodes, score = problem(300)
    held, found = judge(lambda: make(settings("knn-published"), 4), nodes, score, 0.3, 0)
    rows = split(300, 0.3, 1, 0)[0]
    kept = np.setdiff1d(np.arange(300), rows)
    mean = {c: score[kept][nodes.label[kept] == c].mean() for c in range(4)}
    truth = score[rows]
    np.testing.assert_allclose(held.baselines["class_mean"], [mean[c] for c in nodes.label[rows]])
    assert found.baselines["proxy_loss"].spearman == pytest.approx(
        spearmanr(nodes.signals[rows, 0], truth).statistic
    )
    assert found.baselines["knn_published"].spearman == pytest.approx(found.spearman)
    assert found.baselines["random"].spearman == 0.0
    mlp, proxy = make(settings("mlp", epochs=MLP_EPOCHS), 4), make(settings("proxy"), 4)
    for name, rival in (("mlp", mlp), ("proxy", proxy)):
        rival.fit(nodes.take(kept), score[kept])
        expected = spearmanr(rival.predict(nodes.take(rows)), truth).statistic
        assert found.baselines[name].spearman == pytest.approx(expected, abs=1e-6)
    bare = type(nodes)(nodes.embedding, np.full(300, -1), nodes.signals[:, :0])
    rivals = judge(lambda: make(settings("knn-published"), 4), bare, score, 0.3, 0)[1].baselines
    assert rivals["class_mean"].spearman is None and not {"proxy", "proxy_loss"} & set(rivals)
    few = judge(
        lambda: make(settings("knn-published"), 4), nodes.take(np.arange(25)), score[:25], 0.4, 0
    )[1].baselines
    assert "mlp" not in few and "proxy" in few
    quick = hold_out(lambda: make(settings("knn-published"), 4), nodes, score, rows, mlp=False)
    assert quick.baselines.keys() == held.baselines.keys() - {"mlp"}
    np.testing.assert_array_equal(quick.baselines["proxy"], held.baselines["proxy"])
    unseen = type(nodes)(nodes.embedding[:1], np.array([7]), nodes.signals[:1])
    model = make(settings("knn-published"), 8)
    model.fit(nodes, score)
    assert predict(model, nodes, score, unseen, score[:1]).baselines["class_mean"] == pytest.approx(
        score.mean()
    )


def test_transductive(problem, settings) -> None:
    nodes, score = problem(300)
    rows = np.random.default_rng(0).permutation(300)[:120]
    make_it = lambda: make(settings("gnn-published", epochs=4), 4)  # noqa: E731
    graph = {"all_nodes": nodes, "scored_rows": rows}
    found = judge(make_it, nodes.take(rows), score[rows], 0.25, 0, **graph)[1]
    assert found.n_held == 30 and found.spearman is not None and found.spearman > 0.1
    with pytest.raises(RaypipeError, match="all samples"):
        judge(make_it, nodes.take(rows), score[rows], 0.25, 0)
    with pytest.raises(RaypipeError, match="rows of the samples"):
        predict(make_it(), nodes, score, nodes, score)


def test_enough_to_fit_but_not_to_judge(problem, settings) -> None:
    nodes, score = problem(22)
    held, found = judge(lambda: make(settings("gnn", epochs=1), 4), nodes, score, 0.2, 0)
    assert (
        found.spearman is None and "22 measured samples leave 18" in found.note and len(held) == 0
    )
    with pytest.raises(RaypipeError, match="too few"):
        judge(
            lambda: make(settings("gnn", epochs=1), 4),
            nodes.take(np.arange(19)),
            score[:19],
            0.2,
            0,
        )
    few = judge(lambda: make(settings("gnn", epochs=1), 4), nodes, score, 0.02, 0)[1]
    assert few.n_held == 0 and "only 0 held-out samples" in few.note


def test_errors(problem, settings) -> None:
    nodes, score = problem(30)
    with pytest.raises(RaypipeError, match="cannot be split"):
        split(1, 0.2, 1, 0)
    with pytest.raises(RaypipeError, match="30 seed samples but scores"):
        hold_out(lambda: make(settings("knn-published"), 4), nodes, score[:3], np.arange(3))
    with pytest.raises(RaypipeError, match="do not match"):
        compare(pair(score[:3], score[:4]), 0)
    with pytest.raises(RaypipeError, match="2 of 30"):
        compare(pair(np.r_[score[:28], np.nan, np.inf], score), 0)
    with pytest.raises(RaypipeError, match="1 of 30 held-out samples have scores other that"):
        compare(pair(score, score, other=np.r_[score[:29], np.nan]), 0)
    assert spearman(np.ones(5), np.arange(5)) is None
    assert spearman(np.arange(5), np.arange(5) ** 2) == pytest.approx(1)
