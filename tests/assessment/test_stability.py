"""Stability: agreement of proxies, stepped up to their mean."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from raypipe.assessment.stability import Stability, spearman_brown, stability
from raypipe.text import stability_for_cut


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


def of_parts(
    count: int, parts: int, repeats: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What proxies with a common error of each part measure in two runs, and the parts.

    A sample has scores by all proxies but those of its own part, as with cross-fitting.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=count)
    part = np.arange(count) % parts

    def run() -> np.ndarray:
        of_part = rng.normal(size=(count, 1, parts))
        of_proxy = rng.normal(size=(count, repeats, parts))
        scores = (truth[:, None, None] + 0.8 * of_part + of_proxy).reshape(count, -1)
        scores[np.arange(repeats * parts) % parts == part[:, None]] = np.nan
        return scores

    return run(), run(), part


@pytest.mark.parametrize(("parts", "repeats"), [(3, 1), (3, 2), (3, 3), (5, 2)])
def test_with_cross_fitting_it_is_the_agreement_with_another_seed_set(
    parts: int, repeats: int
) -> None:
    """Repeats of a part share its error: counting them as independent would promise too much."""
    first, second, part = of_parts(6000, parts, repeats)
    expected = spearmanr(np.nanmean(first, 1), np.nanmean(second, 1))[0]
    found = stability(first, part, seed=0, parts=parts)
    assert found.value == pytest.approx(expected, abs=0.03)
    assert found.proxies == (parts - 1) * repeats and not found.same_samples
    if repeats > 1:
        assert stability(first, part, seed=0).value > found.value + 0.03  # type: ignore[operator]


@pytest.mark.parametrize("repeats", [2, 3, 4, 9])
def test_repeats_give_the_agreement_with_another_training(repeats: int) -> None:
    """From two on, they are compared in halves: pairs of two or three, then means over several."""
    _, both = noisy(4000, 2 * repeats, 1.2)
    expected = spearmanr(both[:, :repeats].mean(1), both[:, repeats:].mean(1))[0]
    found = stability(both[:, :repeats], np.zeros(4000, int), seed=0)
    assert found.value == pytest.approx(expected, abs=0.03)
    assert found.same_samples and found.proxies == repeats
    assert found.single == pytest.approx(spearmanr(both[:, 0], both[:, -1])[0], abs=0.03)
    assert found.interval is not None and found.interval[0] < found.value < found.interval[1]


def test_repeats_of_the_own_part_are_compared_for_scores_from_the_trajectory() -> None:
    _, values = noisy(3000, 2, 1.0)
    part = np.arange(3000) % 3
    by_proxy = np.full((3000, 6), np.nan)
    for repeat in range(2):
        by_proxy[np.arange(3000), 3 * repeat + part] = values[:, repeat]
    found = stability(by_proxy, part, seed=0, parts=3)
    expected = stability(values, part, seed=0)
    assert found == expected and found.same_samples and found.samples == 3000


def test_both_ways_of_cutting_are_stored() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 3000)
    by_proxy = 10 * label[:, None] + rng.normal(size=(3000, 3))
    found = stability(by_proxy, label, seed=0)
    assert found.over_all is not None and found.within is not None
    assert (found.value, found.interval) == (found.over_all.value, found.over_all.interval)
    within = Stability.from_dict(stability_for_cut(found.as_dict(), True))
    assert within == stability(by_proxy, label, seed=0, within_classes=True)
    assert Stability.from_dict(stability_for_cut(within.as_dict(), False)) == found
    older = {"value": 0.5, "interval": [0.4, 0.6], "within_classes": True, "proxies": 2}
    assert stability_for_cut(older, False) == older
    assert Stability.from_dict(older).value == 0.5


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
    assert Stability.from_dict(json.loads(json.dumps(found.as_dict()))) == found
