"""Properties that `knn`, `mlp`, `trees` and `proxy` share, and a few that only some have."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from raypipe.errors import RaypipeError
from raypipe.extrapolators import make
from raypipe.extrapolators.base import Nodes

METHODS = ("knn", "mlp", "trees", "proxy")
OPTIONS = {"mlp": {"epochs": 15}, "gnn": {"epochs": 2}}


@pytest.fixture(scope="module")
def telling(problem) -> tuple[Nodes, np.ndarray]:
    """500 samples whose score depends on class and embedding; a signal depends on the score."""
    nodes, score = problem(500)
    signals = np.stack([np.exp(-score), np.random.default_rng(1).normal(size=500)], 1)
    return Nodes(nodes.embedding, nodes.label, signals), score


@pytest.fixture(scope="module")
def fitted(telling, settings) -> dict:
    """Every method fitted on the first 300 samples."""
    nodes, score = telling
    models = {method: make(settings(method, **OPTIONS.get(method, {})), 4) for method in METHODS}
    for model in models.values():
        model.fit(nodes.take(np.arange(300)), score[:300])
    return models


REST = np.arange(300, 500)


@pytest.mark.parametrize("method", METHODS)
def test_beats_the_class_mean(telling, fitted, method: str) -> None:
    nodes, score = telling
    mean = np.array([score[:300][nodes.label[:300] == c].mean() for c in range(4)])[
        nodes.label[300:]
    ]
    guess = fitted[method].predict(nodes.take(REST))
    assert guess.dtype == np.float32
    assert spearmanr(guess, score[300:]).statistic > spearmanr(mean, score[300:]).statistic + 0.2
    assert np.square(guess - score[300:]).mean() < np.square(mean - score[300:]).mean()


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_bit_equal(telling, fitted, settings, tmp_path, method: str) -> None:
    from safetensors.numpy import load_file, save_file

    nodes, _ = telling
    tensors, meta = fitted[method].state()
    save_file(tensors, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    again = make(settings(method), 99)
    again.load_state(stored, json.loads(json.dumps(meta, allow_nan=False)))
    rest = nodes.take(REST)
    np.testing.assert_array_equal(fitted[method].predict(rest), again.predict(rest))
    np.testing.assert_array_equal(fitted[method].difficulty(rest), again.difficulty(rest))
    for name in stored:
        with pytest.raises(RaypipeError, match="damaged"):
            make(settings(method), 4).load_state(
                {key: value for key, value in stored.items() if key != name}, meta
            )
    with pytest.raises(RaypipeError, match="cannot be loaded as"):
        again.load_state(stored, {**meta, "method": "gnn"})


@pytest.mark.parametrize("method", METHODS)
def test_repeats_itself_and_leaves_global_random_state(telling, settings, method: str) -> None:
    nodes, score = telling
    results = []
    for _ in range(2):
        model = make(settings(method, epochs=2), 4)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        model.fit(nodes.take(np.arange(100)), score[:100])
        assert (
            torch.equal(before, torch.get_rng_state())
            and (numpy_before == np.random.get_state()[1]).all()
        )
        torch.rand(3), np.random.rand(3)
        results.append(model.predict(nodes.take(REST)))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("method", METHODS)
def test_order_and_batch_do_not_matter_to_a_prediction(telling, fitted, method: str) -> None:
    nodes, _ = telling
    together = fitted[method].predict(nodes.take(REST))
    mixed = np.random.default_rng(0).permutation(200)
    for rows in (mixed, mixed[:101], np.array([7, 3]), np.array([199])):
        np.testing.assert_array_equal(
            fitted[method].predict(nodes.take(REST[rows])), together[rows]
        )
    assert fitted[method].predict(nodes.take(REST[:0])).shape == (0,)


@pytest.mark.parametrize("method", ["knn", "proxy"])
def test_order_of_the_scored_samples_does_not_matter(
    telling, fitted, settings, method: str
) -> None:
    nodes, score = telling
    mixed, model = np.random.default_rng(0).permutation(300), make(settings(method), 4)
    model.fit(nodes.take(mixed), score[mixed])
    rest = nodes.take(REST)
    np.testing.assert_allclose(
        model.predict(rest), fitted[method].predict(rest), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("method", [*METHODS, "gnn"])
@pytest.mark.parametrize("classes", [4, 60])
def test_noise_is_not_learned(settings, method: str, classes: int) -> None:
    """A score that is pure noise must be predicted by about its mean.

    A method that sees a sample's own score in the fit learns a relation that other samples lack.
    """
    rng = np.random.default_rng(0)
    nodes = Nodes(
        rng.normal(size=(900, 6)), rng.integers(0, classes, 900), rng.normal(size=(900, 3))
    )
    score = rng.normal(size=900)
    model = make(settings(method, **OPTIONS.get(method, {})), classes)
    model.fit(nodes.take(np.arange(300)), score[:300])
    guess = model.predict(nodes.take(np.arange(300, 900)))
    assert abs(np.corrcoef(guess, score[300:])[0, 1]) < 0.12
    assert guess.std() < 0.45


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind",
    [
        "unlabelled",
        "half labelled",
        "unseen classes",
        "twenty",
        "no signals",
        "copies",
        "bad signals",
    ],
)
def test_degenerate_input(telling, settings, method: str, kind: str) -> None:
    nodes, score = telling
    seed, rest = np.arange(20 if kind == "twenty" else 60), np.arange(60, 100)
    embedding, label, signals, classes = (
        nodes.embedding.copy(),
        nodes.label.copy(),
        nodes.signals.copy(),
        4,
    )
    if kind == "unlabelled":
        label[:], classes = -1, 0
    elif kind == "half labelled":
        label[::2] = -1
    elif kind == "unseen classes":
        label, classes = np.arange(500) * 5, 2500
    elif kind == "no signals":
        signals = signals[:, :0]
    elif kind == "copies":
        embedding[:] = embedding[0]
    elif kind == "bad signals":
        signals[5, 0], signals[[6, 70], 0], signals[80], signals[:, 1] = (
            np.nan,
            np.inf,
            np.nan,
            np.nan,
        )
    nodes = Nodes(embedding, label, signals)
    model = make(settings(method, epochs=2), classes)
    if (method, kind) == ("proxy", "no signals"):
        with pytest.raises(RaypipeError, match=r"without the proxy's signals.*extrapolate\.method"):
            model.fit(nodes.take(seed), score[seed])
        return
    model.fit(nodes.take(seed), score[seed])
    again = make(settings(method), classes)
    again.load_state(*model.state())
    guess = model.predict(nodes.take(rest))
    assert np.isfinite(guess).all() and np.isfinite(model.difficulty(nodes.take(rest))).all()
    np.testing.assert_array_equal(guess, again.predict(nodes.take(rest)))


@pytest.mark.parametrize("method", METHODS)
def test_constant_scores_are_predicted_and_progress_ends_at_its_total(
    telling, settings, method: str
) -> None:
    nodes, score = telling
    for scores in (np.full(60, -0.3), score[:60]):
        seen: list[tuple[int, int]] = []
        model = make(settings(method, epochs=2), 4)
        model.fit(nodes.take(np.arange(60)), scores, lambda *counts, to=seen: to.append(counts))
        assert seen[-1][0] == seen[-1][1]
        if scores[0] == -0.3:
            np.testing.assert_allclose(model.predict(nodes), -0.3, rtol=1e-5)


@pytest.mark.parametrize("method", ["trees", "proxy"])
def test_signals_must_be_those_of_the_fit(telling, fitted, method: str) -> None:
    nodes, _ = telling
    with pytest.raises(RaypipeError, match="1 signals for each sample, but the fit had 2"):
        fitted[method].predict(Nodes(nodes.embedding, nodes.label, nodes.signals[:, :1]))


@pytest.mark.parametrize("method", ["knn", "trees", "gnn", "knn-published"])
def test_inverted_lists_of_many_scored_samples(telling, settings, monkeypatch, method: str) -> None:
    """Beyond `exact_neighbours` the search uses lists.

    Predictions stay nearly the same, and the lists are part of the state.
    """
    # 40 neighbours of 300 are in most lists
    monkeypatch.setattr("raypipe.extrapolators.neighbours.MAX_EFFORT_DIVISOR", 1)
    nodes, score = telling
    some = np.arange(120 if method == "gnn" else 300)
    models = [
        make(settings(method, exact_neighbours=limit, **OPTIONS.get(method, {})), 4)
        for limit in (300, 20)
    ]
    for model in models:
        model.fit(nodes.take(some), score[some])
    rest = nodes.take(REST)
    search = models[1].state()[1]["search"]
    assert models[0].state()[1]["search"]["kind"] == "exact"
    assert search["kind"] == "ivf" and search["recall"] >= 0.95 and search["effort"] > 0
    assert set(search.get("classes", {})) == (
        set() if method == "knn-published" else {"0", "1", "2", "3"}
    )
    exact, lists = (model.predict(rest) for model in models)
    assert np.corrcoef(exact, lists)[0, 1] > 0.9
    again = make(settings(method), 4)
    again.load_state(*models[1].state())
    for before, after in zip(
        models[1].predict_with_difficulty(rest), again.predict_with_difficulty(rest)
    ):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("method", METHODS)
def test_difficulty_with_a_prediction_is_that_without(telling, fitted, method: str) -> None:
    rest = telling[0].take(REST)
    predicted, difficulty = fitted[method].predict_with_difficulty(rest)
    np.testing.assert_array_equal(predicted, fitted[method].predict(rest))
    np.testing.assert_array_equal(difficulty, fitted[method].difficulty(rest))
