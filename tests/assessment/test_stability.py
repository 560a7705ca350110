"""Stability: agreement of proxies, stepped up to their mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from raypipe.assessment.stability import Stability, spearman_brown, stability


def noisy(count: int, proxies: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A true score per sample, and what each proxy measures of it."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=count)
    return truth, truth[:, None] + noise * rng.normal(size=(count, proxies))


def test_spearman_brown_gives_the_published_value() -> None:
    assert spearman_brown(0.44, 4) == pytest.approx(0.76, abs=0.003)


def test_it_is_the_agreement_of_two_means() -> None:
    _, both = noisy(4000, 6, 1.0)
    expected = spearmanr(both[:, :3].mean(1), both[:, 3:].mean(1))[0]
    found = stability(both[:, :3], np.zeros(4000, int), seed=0)
    assert found.value == pytest.approx(expected, abs=0.03)
    assert found.single == pytest.approx(spearmanr(both[:, 0], both[:, 3])[0], abs=0.03)
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]
    assert found.proxies == 3


def test_proxies_that_agree_on_nothing_but_classes_are_unstable_within_them() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 3000)
    by_proxy = 10 * label[:, None] + rng.normal(size=(3000, 3))
    over_all = stability(by_proxy, label, seed=0)
    within = stability(by_proxy, label, seed=0, within_classes=True)
    assert over_all.value is not None and over_all.value > 0.9
    assert within.value == pytest.approx(0, abs=0.1)


def test_a_sample_is_compared_by_the_proxies_that_scored_it() -> None:
    _, by_proxy = noisy(4000, 4, 0.7)
    part = np.arange(4000) % 4
    by_proxy[np.arange(4000), part] = np.nan
    found = stability(by_proxy, part, seed=0)
    _, whole = noisy(4000, 3, 0.7)
    assert found.proxies == 3
    assert found.value == pytest.approx(stability(whole, part, seed=0).value, abs=0.02)


def test_agreement_below_chance_is_not_stepped_up() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=500)
    found = stability(np.stack([first, -first], 1), np.zeros(500, int), seed=0)
    assert found.value == pytest.approx(-1)


@pytest.mark.parametrize(
    "by_proxy",
    [np.zeros((50, 1)), np.full((50, 3), np.nan), np.ones((50, 3)), np.random.rand(5, 3)],
)
def test_nothing_to_compare_is_unknown_with_a_reason(by_proxy: np.ndarray) -> None:
    found = stability(by_proxy, np.zeros(len(by_proxy), int), seed=0)
    assert found.value is None
    assert found.note


def test_it_survives_json() -> None:
    _, by_proxy = noisy(100, 3, 1.0)
    found = stability(by_proxy, np.zeros(100, int), seed=0)
    assert Stability.from_dict(found.as_dict()) == found
