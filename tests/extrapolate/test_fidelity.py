from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from raypipe.errors import RaypipeError
from raypipe.extrapolate import fidelity as module
from raypipe.extrapolate import make
from raypipe.extrapolate.conformal import Conformal
from raypipe.extrapolate.fidelity import compare, judge, spearman


def test_figures_by_hand() -> None:
    rng = np.random.default_rng(0)
    measured = rng.normal(size=200)
    predicted = np.round(measured + rng.normal(size=200), 1)  # with ties
    found = compare(predicted, measured, 0, n_fit=5)
    assert found.spearman == pytest.approx(spearmanr(predicted, measured).statistic)
    assert found.pearson == pytest.approx(pearsonr(predicted, measured).statistic)
    untied = predicted + 1e-9 * rng.normal(size=200)
    top = set(np.argsort(untied)[-60:]) & set(np.argsort(measured)[-60:])
    assert compare(untied, measured, 0, n_fit=5).overlap[0.3] == pytest.approx(len(top) / 60)
    np.testing.assert_allclose(found.residual, measured - predicted)


def test_bootstrap_equals_the_obvious_loop(monkeypatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 20)
    monkeypatch.setattr(module, "CHUNK_VALUES", 40 * 7)
    rng = np.random.default_rng(3)
    measured = rng.normal(size=40)
    predicted = np.round(measured + rng.normal(size=40), 1)
    found = module._resample(module._Pair(predicted, measured, 0), 40, 9)
    again = np.random.default_rng(9)
    drawn = np.concatenate([again.integers(0, 40, (min(7, 20 - start), 40)) for start in range(0, 20, 7)])
    np.testing.assert_allclose(found["spearman"], [spearmanr(predicted[rows], measured[rows]).statistic for rows in drawn])
    np.testing.assert_allclose(found["pearson"], [pearsonr(predicted[rows], measured[rows]).statistic for rows in drawn])


def test_overlap_of_a_resample_counts_repeats() -> None:
    a, b = np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3])
    pair = module._Pair(a, b, 0)
    # drawn: the third pair three times, the fourth once; the top 2 are 4, 3 by a and 3, 3 by b
    assert pair.overlap(np.array([[0.0, 0, 3, 1]]), 0.5) == pytest.approx([0.5])
    assert pair.overlap(np.ones((1, 4)), 0.5) == pytest.approx([1.0])
    assert pair.overlap(np.ones((1, 4)), 0.25) == pytest.approx([0.0])


def test_intervals_cover_the_truth() -> None:
    rng, inside = np.random.default_rng(0), 0
    for trial in range(40):
        a = rng.normal(size=150)
        b = 0.6 * a + 0.8 * rng.normal(size=150)
        interval = compare(a, b, trial, n_fit=1).spearman_interval
        assert interval is not None
        inside += interval[0] <= 6 / np.pi * np.arcsin(0.3) <= interval[1]  # Spearman of a Gaussian pair with correlation 0.6
    assert inside >= 33


def test_equal_values_on_both_sides_are_no_agreement() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 4000).astype(float), rng.integers(0, 2, 4000).astype(float)
    assert compare(a, b, 0, n_fit=1).overlap[0.3] == pytest.approx(0.3, abs=0.04)


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
    found = compare(a, b, 0, n_fit=1)
    assert found.spearman is None and found.pearson is None and found.spearman_interval is None and found.note
    json.dumps(found.as_dict(), allow_nan=False)


def test_judge_splits_fits_and_compares(problem, settings) -> None:
    nodes, score = problem(300)
    found = judge(lambda: make(settings("gnn", epochs=2), 4), nodes, score, 0.2, 1)
    assert (found.n_fit, found.n_held, len(found.held), len(found.difficulty)) == (240, 60, 60, 60)
    assert found.note == "" and found.spearman is not None and found.spearman > 0.7
    assert found.spearman_interval is not None and found.spearman_interval[0] < found.spearman < found.spearman_interval[1]
    np.testing.assert_array_equal(found.measured, score[found.held])
    again = judge(lambda: make(settings("gnn", epochs=2), 4), nodes, score, 0.2, 1)
    assert again.as_dict() == found.as_dict() and (again.held == found.held).all()
    assert (judge(lambda: make(settings("knn-published"), 4), nodes, score, 0.2, 2).held != found.held).any()
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert set(data["overlap"]) == {"0.3", "0.5", "0.7"} and data["n_held"] == 60
    assert np.isfinite(Conformal.fit(found.residual, found.difficulty, 0.9).half_width(found.difficulty)).all()


def test_held_out_scores_do_not_reach_the_fit(problem, settings) -> None:
    nodes, score = problem(200)
    found = judge(lambda: make(settings("gnn", epochs=2), 4), nodes, score, 0.2, 1)
    changed = score.copy()
    changed[found.held] = 1000 + np.random.default_rng(0).normal(size=40)
    again = judge(lambda: make(settings("gnn", epochs=2), 4), nodes, changed, 0.2, 1)
    np.testing.assert_array_equal(found.predicted, again.predicted)


def test_baselines(problem, settings) -> None:
    nodes, score = problem(300)
    held = judge(lambda: make(settings("knn-published"), 4), nodes, score, 0.3, 0)
    kept = np.setdiff1d(np.arange(300), held.held)
    mean = {c: score[kept][nodes.label[kept] == c].mean() for c in range(4)}
    truth = score[held.held]
    assert held.baselines["class_mean"] == pytest.approx(spearmanr([mean[c] for c in nodes.label[held.held]], truth).statistic)
    assert held.baselines["proxy_loss"] == pytest.approx(spearmanr(nodes.signals[held.held, 0], truth).statistic)
    assert held.baselines["knn_published"] == pytest.approx(held.spearman) and held.baselines["random"] == 0.0
    mlp, proxy = make(settings("mlp", epochs=module.MLP_EPOCHS), 4), make(settings("proxy"), 4)
    for name, model in (("mlp", mlp), ("proxy", proxy)):
        model.fit(nodes.take(kept), score[kept])
        assert held.baselines[name] == pytest.approx(spearmanr(model.predict(nodes.take(held.held)), truth).statistic)
    bare = type(nodes)(nodes.embedding, np.full(300, -1), nodes.signals[:, :0])
    found = judge(lambda: make(settings("knn-published"), 4), bare, score, 0.3, 0).baselines
    assert found["class_mean"] is None and found["proxy_loss"] is None and found["proxy"] is None
    few = judge(lambda: make(settings("knn-published"), 4), nodes.take(np.arange(25)), score[:25], 0.4, 0).baselines
    assert few["mlp"] is None and few["proxy"] is not None


def test_transductive(problem, settings) -> None:
    nodes, score = problem(300)
    rows = np.random.default_rng(0).permutation(300)[:120]
    make_it = lambda: make(settings("gnn-published", epochs=4), 4)  # noqa: E731
    found = judge(make_it, nodes.take(rows), score[rows], 0.25, 0, all_nodes=nodes, scored_rows=rows)
    assert found.n_held == 30 and found.spearman is not None and found.spearman > 0.1
    with pytest.raises(RaypipeError, match="all samples"):
        judge(make_it, nodes.take(rows), score[rows], 0.25, 0)


def test_enough_to_fit_but_not_to_judge(problem, settings) -> None:
    nodes, score = problem(22)
    found = judge(lambda: make(settings("gnn", epochs=1), 4), nodes, score, 0.2, 0)
    assert found.spearman is None and "22 measured samples leave 18" in found.note and len(found.residual) == 0
    with pytest.raises(RaypipeError, match="too few"):
        judge(lambda: make(settings("gnn", epochs=1), 4), nodes.take(np.arange(19)), score[:19], 0.2, 0)
    few = judge(lambda: make(settings("gnn", epochs=1), 4), nodes, score, 0.02, 0)
    assert few.n_held == 0 and "only 0 held-out samples" in few.note


def test_errors(problem, settings) -> None:
    nodes, score = problem(30)
    with pytest.raises(RaypipeError, match="cannot be split"):
        judge(lambda: make(settings("knn-published"), 4), nodes.take(np.arange(1)), score[:1], 0.2, 0)
    with pytest.raises(RaypipeError, match="do not match"):
        compare(score[:3], score[:4], 0, n_fit=1)
    with pytest.raises(RaypipeError, match="2 of 30"):
        compare(np.r_[score[:28], np.nan, np.inf], score, 0, n_fit=1)
    assert spearman(np.ones(5), np.arange(5)) is None
    assert spearman(np.arange(5), np.arange(5) ** 2) == pytest.approx(1)
