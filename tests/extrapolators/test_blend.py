from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from raypipe.errors import RaypipeError
from raypipe.extrapolators import make
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.blend import EXPERTS, AnchorGnn, blend
from raypipe.extrapolators.gp.regression import KernelRegression

EQUAL = dict.fromkeys(EXPERTS, 0.25)


@pytest.fixture(scope="module")
def fitted(problem, settings) -> tuple[AnchorGnn, Nodes, np.ndarray]:
    nodes, score = problem(300)
    gnn = AnchorGnn(settings("gnn", epochs=6), 4)
    gnn.fit(nodes.take(np.arange(150)), score[:150])
    gnn._weights = EQUAL  # so that every expert affects every comparison below
    return gnn, nodes, score


def test_beats_the_published_knn_where_class_and_place_matter(problem, settings) -> None:
    nodes, score = problem(900, classes=6)
    seed, rest = np.arange(300), np.arange(300, 900)
    correlation = {}
    for method in ("gnn", "knn-published"):
        model = make(settings(method, epochs=10), 6)
        model.fit(nodes.take(seed), score[seed])
        correlation[method] = spearmanr(model.predict(nodes.take(rest)), score[rest]).statistic
    assert correlation["gnn"] > 0.85
    assert correlation["gnn"] > correlation["knn-published"] + 0.2


def test_blend_takes_the_better_experts(problem, settings, monkeypatch) -> None:
    nodes, score = problem(150)
    gnn = AnchorGnn(settings("gnn", epochs=1), 4)  # networks hardly learn in one epoch
    gnn.fit(nodes, score)
    assert gnn._weights["networks"] < 0.3 and sum(gnn._weights.values()) == pytest.approx(1)
    monkeypatch.setattr(
        "raypipe.extrapolators.blend.KernelRegression.fit",
        lambda self, u, v, label, z, rng, head: -z,
    )
    gnn = AnchorGnn(settings("gnn", epochs=8), 4)
    gnn.fit(nodes, score)
    assert gnn._weights["kernel"] < 0.1


def test_signals_count_where_they_tell(problem, settings) -> None:
    nodes, score = problem(300)
    rng = np.random.default_rng(0)
    score = rng.permutation(score)  # neither embedding nor class predicts it
    nodes = Nodes(
        nodes.embedding, nodes.label, np.stack([np.exp(3 * score), rng.normal(size=300)], 1)
    )
    gnn = AnchorGnn(settings("gnn", epochs=2), 4)
    gnn.fit(nodes.take(np.arange(150)), score[:150])
    for weights in (
        gnn._weights,
        {**EQUAL, "kernel": 0},
        dict.fromkeys(EXPERTS, 0.0) | {"signal": 1.0},
    ):
        gnn._weights = weights
        assert spearmanr(gnn.predict(nodes.take(np.arange(150, 300))), score[150:]).statistic > 0.9


def test_blend_is_the_best_convex_combination() -> None:
    rng = np.random.default_rng(0)
    guesses, noise = rng.normal(size=(4000, 3)), 0.1 * rng.normal(size=4000)
    np.testing.assert_allclose(
        blend(guesses, guesses @ [0.2, 0.5, 0.3] + noise), [0.2, 0.5, 0.3], atol=0.01
    )
    weights = blend(guesses, guesses @ [0.9, -0.5, 0.1])
    assert weights.sum() == pytest.approx(1) and weights[1] == 0 and weights[0] > 0.8
    weights = blend(np.c_[np.full(4000, np.nan), guesses], guesses[:, 0] + 0.02 * guesses[:, 1])
    assert weights.tolist() == [0, 1, 0, 0]  # neither the one that is not finite nor the weak one
    # too few samples to move the weight away from the first
    np.testing.assert_allclose(blend(guesses[:2], guesses[:2, 1]), [1, 0, 0], atol=0.35)


def test_no_sample_is_its_own_neighbour_in_the_fit(problem, settings, monkeypatch) -> None:
    nodes, score = problem(60)
    seen = []
    import raypipe.extrapolators.blend as module

    original = module.train

    def watch(queries, anchors, rows, *others):
        assert queries.neighbour.shape == (60, 32)
        own_neighbour = queries.neighbour == torch.arange(60)[:, None]
        seen.append(bool(own_neighbour.any()))
        return original(queries, anchors, rows, *others)

    monkeypatch.setattr(module, "train", watch)
    AnchorGnn(settings("gnn", epochs=1), 4).fit(nodes, score)
    assert seen == [False] * 3


def test_round_trip_is_bit_equal(fitted, settings, tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    gnn, nodes, _ = fitted
    tensors, meta = gnn.state()
    save_file(tensors, tmp_path / "model.safetensors")
    again = AnchorGnn(settings("gnn"), 99)
    again.load_state(
        load_file(tmp_path / "model.safetensors"), json.loads(json.dumps(meta, allow_nan=False))
    )
    rest = nodes.take(np.arange(150, 300))
    np.testing.assert_array_equal(gnn.predict(rest), again.predict(rest))
    np.testing.assert_array_equal(gnn.difficulty(rest), again.difficulty(rest))
    with pytest.raises(RaypipeError, match="damaged"):
        again.load_state(
            {name: value for name, value in tensors.items() if name != "kernel.weight"}, meta
        )
    with pytest.raises(RaypipeError, match="damaged"):
        again.load_state({**tensors, "network0.out.0.bias": np.zeros(3, np.float32)}, meta)


def test_one_network_will_do(problem, settings) -> None:
    nodes, score = problem(300)
    gnn = AnchorGnn(settings("gnn", epochs=6), 4)
    gnn.members, steps = 1, []
    gnn.fit(
        nodes.take(np.arange(150)), score[:150], lambda done, total: steps.append((done, total))
    )
    assert steps[-1] == (8, 8) and sum(gnn._weights.values()) == pytest.approx(1)
    gnn._weights = EQUAL
    again, rest = AnchorGnn(settings("gnn"), 4), nodes.take(np.arange(150, 300))
    again.load_state(*gnn.state())
    assert spearmanr(gnn.predict(rest), score[150:]).statistic > 0.6
    np.testing.assert_array_equal(gnn.predict(rest), again.predict(rest))


def test_repeats_itself_and_leaves_global_random_state(problem, settings) -> None:
    nodes, score = problem(120)
    seed, rest = nodes.take(np.arange(80)), nodes.take(np.arange(80, 120))
    results = []
    for number in (0, 0, 1):
        gnn = AnchorGnn(settings("gnn", epochs=3, seed=number), 4)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        gnn.fit(seed, score[:80])
        assert (
            torch.equal(before, torch.get_rng_state())
            and (numpy_before == np.random.get_state()[1]).all()
        )
        torch.rand(3)
        gnn._weights = EQUAL
        results.append(gnn.predict(rest))
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_a_prediction_does_not_depend_on_its_batch(fitted) -> None:
    gnn, nodes, _ = fitted
    together = gnn.predict(nodes.take(np.arange(150, 300)))
    for rows in ([160, 155], [299], np.random.default_rng(0).permutation(np.arange(150, 300))[:77]):
        np.testing.assert_array_equal(
            gnn.predict(nodes.take(np.array(rows))), together[np.array(rows) - 150]
        )
        doubts = (gnn.doubt(nodes.take(some)) for some in (np.array(rows), np.arange(150, 300)))
        np.testing.assert_array_equal(next(doubts), next(doubts)[np.array(rows) - 150])
    assert gnn.predict(nodes.take(np.arange(0))).shape == (0,) and together.dtype == np.float32
    for before, after in zip(
        (gnn.predict, gnn.difficulty), gnn.predict_with_difficulty(nodes.take(np.arange(150, 300)))
    ):
        np.testing.assert_array_equal(before(nodes.take(np.arange(150, 300))), after)
    gnn._weights = dict.fromkeys(EXPERTS, 0.0) | {"kernel": 1.0}
    alone = gnn.predict_with_difficulty(nodes.take(np.arange(150, 300)))[0]
    np.testing.assert_array_equal(gnn.predict(nodes.take(np.arange(150, 300))), alone)
    gnn._weights = EQUAL


def test_progress_ends_at_its_total(problem, settings) -> None:
    nodes, score = problem(40)
    for scores in (score[:40], np.ones(40)):
        seen: list[tuple[int, int]] = []
        AnchorGnn(settings("gnn", epochs=2), 4).fit(
            nodes, scores, lambda *counts, to=seen: to.append(counts)
        )
        assert seen[-1][0] == seen[-1][1] == len(seen)


@pytest.mark.parametrize(
    "kind",
    [
        "twenty",
        "one class",
        "unlabelled",
        "half labelled",
        "many classes",
        "no signals",
        "bad signals",
        "copies",
    ],
)
def test_degenerate_input(problem, settings, kind: str) -> None:
    nodes, score = problem(60)
    seed, rest = np.arange(20 if kind == "twenty" else 40), np.arange(40, 60)
    embedding, label, signals, classes = (
        nodes.embedding.copy(),
        nodes.label.copy(),
        nodes.signals.copy(),
        4,
    )
    if kind == "one class":
        label[:], classes = 0, 1
    elif kind == "unlabelled":
        label[:], classes = -1, 0
    elif kind == "half labelled":
        label[::2] = -1
    elif kind == "many classes":
        # every class once, so that those of the unscored samples are unseen
        label, classes = np.arange(60) * 50, 3000
    elif kind == "no signals":
        signals = signals[:, :0]
    elif kind == "bad signals":
        signals[5, 0], signals[50, 1], signals[:, 2] = np.nan, np.inf, np.nan
    elif kind == "copies":
        embedding[:] = embedding[0]
    nodes = Nodes(embedding, label, signals)
    gnn = AnchorGnn(settings("gnn", epochs=2), classes)
    gnn.fit(nodes.take(seed), score[seed])
    gnn._weights = EQUAL
    assert (
        np.isfinite(gnn.predict(nodes.take(rest))).all()
        and np.isfinite(gnn.difficulty(nodes.take(rest))).all()
    )


def test_constant_scores_are_predicted(problem, settings) -> None:
    nodes, _ = problem(60)
    gnn = AnchorGnn(settings("gnn"), 4)
    gnn.fit(nodes, np.full(60, -0.3))
    again = AnchorGnn(settings("gnn"), 4)
    again.load_state(*gnn.state())
    for model in (gnn, again):
        np.testing.assert_allclose(model.predict(nodes), -0.3, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-7, 1e6])
def test_predictions_are_in_units_of_the_score(problem, settings, scale: float) -> None:
    nodes, score = problem(200)
    gnn = AnchorGnn(settings("gnn", epochs=2), 4)
    gnn.fit(nodes.take(np.arange(100)), score[:100] * scale)
    slope = np.polyfit(
        score[100:], gnn.predict(nodes.take(np.arange(100, 200))).astype(float) / scale, 1
    )[0]
    assert 0.4 < slope < 1.1


def test_errors_name_what_is_wrong(problem, settings, fitted) -> None:
    nodes, score = problem(30)
    gnn = AnchorGnn(settings("gnn"), 4)
    with pytest.raises(RaypipeError, match="not fitted"):
        gnn.predict(nodes)
    with pytest.raises(RaypipeError, match="19 measured samples are too few, it needs 20"):
        gnn.fit(nodes.take(np.arange(19)), score[:19])
    broken = Nodes(
        np.where(np.arange(30)[:, None] < 4, np.nan, nodes.embedding), nodes.label, nodes.signals
    )
    with pytest.raises(RaypipeError, match="4 of 30 embeddings"):
        gnn.fit(broken, score)
    model, every, _ = fitted
    with pytest.raises(RaypipeError, match="1 signals for each sample, but the fit had 3"):
        model.predict(Nodes(every.embedding, every.label, every.signals[:, :1]))


def test_the_last_layer_is_that_of_the_embeddings_as_they_are(
    problem, settings, monkeypatch
) -> None:
    nodes, score = problem(60)
    moved = Nodes(5 * nodes.embedding + 3, nodes.label, nodes.signals)
    weight, bias = (
        np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32),
        np.arange(4, dtype=np.float32),
    )
    seen = []
    fit = KernelRegression.fit

    def watch(self, u, v, label, z, rng, head=None):
        seen.append(u @ head[0].T + head[1])
        return fit(self, u, v, label, z, rng, head)

    monkeypatch.setattr("raypipe.extrapolators.blend.KernelRegression.fit", watch)
    gnn = AnchorGnn(settings("gnn", epochs=1), 4)
    gnn.head = weight, bias
    gnn.fit(moved, score)
    np.testing.assert_allclose(seen[0], moved.embedding @ weight.T + bias, rtol=1e-4, atol=1e-4)
    again = AnchorGnn(settings("gnn"), 4)
    again.load_state(*gnn.state())
    np.testing.assert_array_equal(again.predict(moved), gnn.predict(moved))
