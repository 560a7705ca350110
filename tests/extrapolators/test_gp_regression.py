from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from raypipe.extrapolators.features import KNOTS, Scaler, Target
from raypipe.extrapolators.gp import marginal_likelihood as likelihood_module
from raypipe.extrapolators.gp import regression as kernel_module
from raypipe.extrapolators.gp.marginal_likelihood import KernelConstants
from raypipe.extrapolators.gp.regression import KernelRegression


def arrays(
    problem, count: int = 120, **values
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    nodes, score = problem(count, **values)
    scaler = Scaler.fit(nodes)
    return scaler.embedding(nodes), scaler.signals(nodes), nodes.label, Target.fit(score)[1]


def unit_of_errors(model: KernelRegression) -> float:
    return float(model._units[3])


def matrix(model: KernelRegression, u: np.ndarray, v: np.ndarray, label: np.ndarray) -> np.ndarray:
    points = model._with_error(model._points(u, v, label))
    return model._kernel(points, points).numpy()


def test_kernel_formula(problem) -> None:
    u, v, label, z = arrays(problem, 50)
    label[:5] = -1
    model, head = (
        KernelRegression(),
        (np.random.default_rng(1).normal(size=(4, u.shape[1])), np.arange(4.0)),
    )
    model.fit(u, v, label, z, np.random.default_rng(0), head)
    a1, l1, a2, l2, a3, l3, l4, a4, l5, w, _ = KernelConstants.from_logarithms(model._constants)
    error = softmax(u @ head[0].T + head[1], 1) - np.eye(5)[label][:, :4]
    error[label < 0] = 0
    length = np.linalg.norm(error, axis=1, keepdims=True)
    middle = np.sort(length[label >= 0, 0])[(np.count_nonzero(label >= 0) - 1) // 2]
    error = error / np.maximum(length, 1e-300) * np.log1p(length / middle)
    assert unit_of_errors(model) == pytest.approx(np.square(error).sum(1).mean())
    unit = model._units.numpy()
    mean = np.array([u[label == c].mean(0) if c >= 0 else np.zeros(u.shape[1]) for c in label])
    kernel = matrix(model, u, v, label)
    for i, j in [(0, 1), (0, 10), (10, 11), (20, 20), (30, 41)]:
        r2 = (
            np.sum((u[i] - u[j]) ** 2.0) / unit[0] ** 2
            + w**2 * np.sum((v[i] - v[j]) ** 2.0) / unit[1] ** 2
        )
        m = [
            (1 + np.sqrt(3 * r2) / length) * np.exp(-np.sqrt(3 * r2) / length)
            for length in (l1, l2, l3, l5)
        ]
        known = label[i] >= 0 and label[j] >= 0
        near = np.exp(-np.linalg.norm(mean[i] - mean[j]) / unit[2] / l4) * known
        expected = a1 * m[0] + a2 * m[1] * (known and label[i] == label[j]) + a3 * m[2] * near
        expected += a4 * m[3] * error[i] @ error[j] / unit[3]
        assert kernel[i, j] == pytest.approx(expected, rel=1e-4)
    assert np.linalg.eigvalsh(kernel).min() > -1e-8  # a covariance, unlabelled samples included
    points = model._with_error(model._points(u, v, label))
    again = (
        model._marginal_likelihood(points, torch.from_numpy(z)).covariance(model._constants).numpy()
    )
    np.testing.assert_allclose(again, np.tril(kernel), atol=1e-7)


def test_errors_of_samples_that_were_not_memorised_stay_within_reason(problem) -> None:
    """The proxy has memorised the scored samples: errors of 1e-4 there, up to 1 elsewhere."""
    u, v, label, z = arrays(problem, 400)
    rng, classes = np.random.default_rng(0), int(label.max()) + 1
    # one column of u holds the logit of the own class, so that the error is exp(-logit) or so
    logit = np.r_[rng.normal(9, 0.5, 200), rng.normal(0, 3, 200)]
    u = np.concatenate([u, np.eye(classes)[label] * logit[:, None]], 1).astype(np.float32)
    head = (np.concatenate([np.zeros((classes, u.shape[1] - classes)), np.eye(classes)], 1),)
    model = KernelRegression()
    left_out = model.fit(u[:200], v[:200], label[:200], z[:200], rng, (*head, np.zeros(classes)))
    assert model.error_length(u[:200], label[:200]).max() < 2.5
    assert model.error_length(u[200:], label[200:]).max() > 5
    points = model._with_error(model._points(u, v, label))
    norm = points.error.norm(dim=1).numpy()
    assert norm[200:].max() <= norm[:200].max() * (1 + 1e-9)
    predicted = model.predict(u[200:], v[200:], label[200:])
    assert np.abs(predicted).max() < 1.5 * np.abs(left_out).max()


def test_likelihood_and_its_gradient(problem, monkeypatch) -> None:
    u, v, label, z = arrays(problem, 40)
    label[:5] = -1
    model, head = (
        KernelRegression(),
        (np.random.default_rng(1).normal(size=(4, u.shape[1])), np.arange(4.0)),
    )
    model.fit(u, v, label, z, np.random.default_rng(0), head)
    monkeypatch.setattr(likelihood_module, "CHUNK_PAIRS", 100)
    likelihood = model._marginal_likelihood(
        model._with_error(model._points(u, v, label)), torch.from_numpy(z)
    )
    at = torch.from_numpy(np.random.default_rng(2).normal(scale=0.3, size=11) + np.log(0.5))
    loss, gradient = likelihood(at)
    covariance = np.tril(likelihood.covariance(at).numpy())
    covariance += np.tril(covariance, -1).T + (
        np.exp(at[-1].item()) + likelihood_module.MIN_NOISE
    ) * np.eye(40)
    _, logarithm = np.linalg.slogdet(covariance)
    assert loss == pytest.approx(z @ np.linalg.solve(covariance, z) / 2 + logarithm / 2)
    for place, step in enumerate(1e-5 * torch.eye(11, dtype=torch.float64)):
        slope = (likelihood(at + step)[0] - likelihood(at - step)[0]) / 2e-5
        assert gradient[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_constants_of_another_regression_are_used_as_they_are(problem) -> None:
    u, v, label, z = arrays(problem, 150)
    first, second = KernelRegression(likelihood_rows=60), KernelRegression()
    first.fit(u[:100], v[:100], label[:100], z[:100], np.random.default_rng(0))
    second.fit(u[:100], v[:100], label[:100], z[:100], np.random.default_rng(0))
    assert not torch.equal(first._constants, second._constants), "learned from other samples"
    reused = KernelRegression(constants=first.learned_constants)
    reused.fit(u[:100], v[:100], label[:100], z[:100], np.random.default_rng(0))
    rest = u[100:], v[100:], label[100:]
    np.testing.assert_array_equal(reused.predict(*rest), first.predict(*rest))


@pytest.mark.parametrize("classes", [1, 4, 90])
def test_neither_blocks_nor_company_change_a_kernel_value(
    problem, monkeypatch, classes: int
) -> None:
    u, v, label, z = arrays(problem, 150, classes=classes)
    label[:9] = -1
    model, head = KernelRegression(), np.random.default_rng(1).normal(size=(classes, u.shape[1]))
    model.fit(
        u[:100],
        v[:100],
        label[:100],
        z[:100],
        np.random.default_rng(0),
        None if classes == 1 else (head, np.zeros(classes)),
    )
    known, others = (
        model._with_error(model._points(u[rows], v[rows], label[rows]))
        for rows in (slice(0, 100), slice(100, 150))
    )
    whole, guess = model._kernel(others, known), model.predict(u[100:], v[100:], label[100:])
    monkeypatch.setattr(kernel_module, "CACHED_VALUES", 700)
    np.testing.assert_allclose(model._kernel(others, known), whole, atol=1e-12)
    np.testing.assert_allclose(model._kernel(known, others), whole.T, atol=1e-7)
    np.testing.assert_allclose(
        [
            model.predict(u[row : row + 1], v[row : row + 1], label[row : row + 1])[0]
            for row in range(100, 150)
        ],
        guess,
    )


def test_equals_the_textbook_regression_and_its_left_out_predictions(problem) -> None:
    u, v, label, z = arrays(problem, 80)
    model = KernelRegression()
    left_out = model.fit(u, v, label, z, np.random.default_rng(0))
    noise = np.exp(model._constants[-1].item()) + kernel_module.MIN_NOISE
    covariance = matrix(model, u, v, label)
    np.testing.assert_allclose(
        model.predict(u, v, label),
        covariance @ np.linalg.solve(covariance + noise * np.eye(80), z),
        atol=1e-6,
    )
    for row in (0, 40, 79):
        rest = np.arange(80) != row
        alone = np.linalg.solve(covariance[np.ix_(rest, rest)] + noise * np.eye(79), z[rest])
        assert left_out[row] == pytest.approx(covariance[row, rest] @ alone, abs=1e-5)


def test_left_out_prediction_does_not_contain_the_own_score(problem) -> None:
    u, v, label, z = arrays(problem, 100)
    model = KernelRegression()
    before = model.fit(u, v, label, z, np.random.default_rng(0))
    changed = z.copy()
    changed[17] += 3
    after = model._solve(model._points(u, v, label), torch.from_numpy(changed)).numpy()
    assert after[17] == pytest.approx(before[17], abs=1e-6)
    assert np.abs(after - before).max() > 0.05


def test_a_score_of_the_gradient_is_told_by_the_error(problem) -> None:
    u, v, label, _ = arrays(problem, 500, classes=5)
    rng = np.random.default_rng(3)
    head = rng.normal(size=(5, u.shape[1])), rng.normal(size=5)
    error = softmax(u @ head[0].T + head[1], 1) - np.eye(5)[label]
    score = np.einsum("nc,nd,cd->n", error, u, rng.normal(size=(5, u.shape[1])))  # < e h^T, G >
    z, known, rest = Target.fit(score)[1], slice(0, 200), slice(200, 500)
    fidelity = []
    for last_layer in (None, head):
        model = KernelRegression()
        model.fit(u[known], v[known], label[known], z[known], np.random.default_rng(0), last_layer)
        fidelity.append(np.corrcoef(model.predict(u[rest], v[rest], label[rest]), z[rest])[0, 1])
        again = KernelRegression.from_tensors(model.tensors(), u[known], v[known], label[known])
        np.testing.assert_array_equal(
            again.predict(u[rest], v[rest], label[rest]),
            model.predict(u[rest], v[rest], label[rest]),
        )
    assert fidelity[1] > fidelity[0] + 0.05 and fidelity[1] > 0.9


def test_many_samples_use_some_as_support(problem, monkeypatch) -> None:
    u, v, label, z = arrays(problem, 400)
    whole = KernelRegression()
    whole.fit(u[:300], v[:300], label[:300], z[:300], np.random.default_rng(0))
    monkeypatch.setattr(kernel_module, "INDUCING_ROWS", 150)
    monkeypatch.setattr(kernel_module, "CHUNK_VALUES", 150 * 64)
    part = KernelRegression()
    left_out = part.fit(u[:300], v[:300], label[:300], z[:300], np.random.default_rng(0))
    assert len(part._weight) == 150 and left_out.shape == (300,)
    rest = u[300:], v[300:], label[300:]
    assert np.corrcoef(whole.predict(*rest), part.predict(*rest))[0, 1] > 0.97
    assert np.corrcoef(part.predict(*rest), z[300:])[0, 1] > 0.75
    assert np.corrcoef(left_out, z[:300])[0, 1] > 0.75


def test_signals_are_used_where_they_tell(problem) -> None:
    nodes, _ = problem(300)
    score = nodes.signals[:, 1].astype(np.float64)
    scaler, z = Scaler.fit(nodes), Target.fit(score)[1]
    u, v = scaler.embedding(nodes), scaler.signals(nodes)
    model = KernelRegression()
    model.fit(u[:200], v[:200], nodes.label[:200], z[:200], np.random.default_rng(0))
    assert np.corrcoef(model.predict(u[200:], v[200:], nodes.label[200:]), score[200:])[0, 1] > 0.8


@pytest.mark.parametrize(
    "kind", ["duplicates", "one class", "no labels", "no signals", "constant features", "twenty"]
)
def test_degenerate_input(problem, kind: str) -> None:
    u, v, label, z = arrays(problem, 20 if kind == "twenty" else 100)
    if kind == "duplicates":
        u, v, label = np.repeat(u[:10], 10, 0), np.repeat(v[:10], 10, 0), np.repeat(label[:10], 10)
    elif kind == "one class":
        label = np.zeros(100, np.int64)
    elif kind == "no labels":
        label = np.full(100, -1)
    elif kind == "no signals":
        v = v[:, :0]
    elif kind == "constant features":
        u, v = np.zeros_like(u), np.zeros_like(v)
    model = KernelRegression()
    assert np.isfinite(model.fit(u, v, label, z, np.random.default_rng(0))).all()
    far = np.full_like(u, 100.0)
    unseen = np.full(len(label), 3)  # in some cases a class without a scored sample
    assert np.isfinite(model.predict(far, v, unseen)).all()
    assert model.predict(u[:0], v[:0], label[:0]).shape == (0,)


def test_signals_become_bounded_ranks(problem) -> None:
    nodes, _ = problem(500)
    signals = np.exp(3 * nodes.signals)
    signals[:200, 1], signals[3, 2], signals[:, 0] = 0, np.nan, 4
    seed = type(nodes)(nodes.embedding, nodes.label, signals)
    scaler = Scaler.fit(seed)
    v = scaler.signals(seed)
    order = signals[4:, 2].argsort()
    assert (np.diff(v[4:, 2][order]) >= 0).all() and abs(v[:, 2].std() - 1) < 0.05 and v[3, 2] == 0
    # -0.84 is the normal score of rank 0.2
    assert len(np.unique(v[:200, 1])) == 1 and v[0, 1] == pytest.approx(-0.84, abs=0.05)
    assert np.abs(v[:, 0]).max() < 0.01  # a constant signal has the middle rank
    beyond = type(nodes)(
        nodes.embedding[:2], nodes.label[:2], [[1e9, 1e9, 1e9], [-1e9, -1e9, -1e9]]
    )
    assert np.abs(scaler.signals(beyond)).max() < 3.2 and KNOTS == 257


def test_wild_scores_are_pulled_in_and_others_are_not() -> None:
    score = np.random.default_rng(0).normal(size=1000)
    target, z = Target.fit(score * 1e-6 + 5)
    np.testing.assert_allclose(z, (score - score.mean()) / score.std(), atol=1e-6)
    np.testing.assert_allclose(target.restore(z), score * 1e-6 + 5, rtol=1e-6)
    target, z = Target.fit(np.r_[score, 1e9])
    assert z[:1000].std() > 0.8
    assert Target.fit(np.full(50, 0.1))[0].spread == 0
