"""The linear probe against scikit-learn and its promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from raypipe.errors import RaypipeError
from raypipe.scores import linear_probe
from raypipe.scores.linear_probe import LinearProbe
from raypipe.vision.output_statistics import output_statistics


def clusters(count: int, classes: int = 3, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, count)
    centre = rng.normal(size=(classes, width))
    return (centre[label] + rng.normal(size=(count, width))).astype(np.float32), label


def test_it_is_linear_discriminant_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "RIDGE", 1e-9)
    monkeypatch.setattr(linear_probe, "PRIOR", 0.0)
    monkeypatch.setattr(linear_probe, "_best_temperature", lambda *_: 1.0)
    z, y = clusters(4000)
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(z, y)
    expected = -np.log(reference.predict_proba(z)[np.arange(len(y)), y])
    found = LinearProbe.fit(z, y, 3).statistics(z, y)["loss"]
    assert np.abs(found - expected).max() < 0.05  # leaving one of 1,333 out changes no more
    assert np.corrcoef(found, expected)[0, 1] > 0.9999


def test_a_sample_is_left_out_of_the_mean_of_its_class() -> None:
    z, y = clusters(30)
    probe = LinearProbe.fit(z, y, 3)
    for row in (0, 7):
        rest = np.arange(30) != row
        without = LinearProbe.fit(z[rest], y[rest], 3)
        # the class means without the sample, but the covariance and the prior mean of all
        moved = probe.mean.copy()
        moved[y[row]] = without.mean[y[row]]
        left_out = LinearProbe(moved, probe.count + 1e9, probe.precision, probe.temperature)
        expected = left_out.statistics(z[[row]], y[[row]])["loss"]
        assert probe.statistics(z[[row]], y[[row]])["loss"] == pytest.approx(expected, rel=0.1)


def test_statistics_are_those_of_the_networks_output() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 4)) * 3
    label = np.arange(20) % 4
    expected = output_statistics(torch.from_numpy(logits), torch.from_numpy(label))
    found = linear_probe._output_statistics(logits, label)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values.numpy(), abs=1e-9)


def test_a_sample_depends_on_no_companion_and_on_no_order() -> None:
    z, y = clusters(500)
    probe = LinearProbe.fit(z, y, 3)
    whole = probe.statistics(z, y)["loss"]
    alone = np.concatenate([probe.statistics(z[[row]], y[[row]])["loss"] for row in range(500)])
    assert np.array_equal(whole, alone)
    order = np.random.default_rng(1).permutation(500)
    again = LinearProbe.fit(z[order], y[order], 3)
    assert again.statistics(z, y)["loss"] == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_mislabelled_samples_have_the_highest_losses() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 600)
    z = 6 * np.eye(3)[y] + rng.normal(size=(600, 3))
    wrong = np.arange(20)
    noisy = y.copy()
    noisy[wrong] = (y[wrong] + 1) % 3
    loss = LinearProbe.fit(z, noisy, 3).statistics(z, noisy)["loss"]
    assert set(np.argsort(loss)[-20:]) == set(wrong)


def test_empty_classes_single_samples_and_unlabelled_ones_are_finite() -> None:
    z, y = clusters(50)
    y[y == 2] = 1
    y[0], y[1] = 4, -1
    statistics = LinearProbe.fit(z, y, 6).statistics(z, y)
    assert all(np.isfinite(values).all() for values in statistics.values())


def test_the_temperature_minimises_the_loss_whatever_the_scale_of_the_embeddings() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 3000)
    # heavy tails: at temperature 1 the probe is much too sure
    z = 2 * np.eye(3)[y] + rng.standard_t(3, size=(3000, 3))
    losses = []
    for scale in (1.0, 1000.0):
        probe = LinearProbe.fit(scale * z, y, 3)
        loss = probe.statistics(scale * z, y)["loss"]
        for other in (1.0, 0.5 * probe.temperature, 2 * probe.temperature):
            changed = replace(probe, temperature=other).statistics(scale * z, y)["loss"]
            assert loss.mean() < changed.mean()
        losses.append(loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_constant_embeddings_know_nothing() -> None:
    y = np.arange(30) % 3
    loss = LinearProbe.fit(np.ones((30, 4)), y, 3).statistics(np.ones((30, 4)), y)["loss"]
    assert loss == pytest.approx(np.log(3), abs=1e-6)


def test_one_class_is_refused() -> None:
    with pytest.raises(RaypipeError, match="at least two classes"):
        LinearProbe.fit(np.ones((5, 2)), np.zeros(5, int), 3)


def test_it_survives_tensors() -> None:
    z, y = clusters(50)
    probe = LinearProbe.fit(z, y, 3)
    again = LinearProbe.from_tensors(probe.tensors())
    assert np.array_equal(again.statistics(z, y)["loss"], probe.statistics(z, y)["loss"])
