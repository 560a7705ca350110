"""Intervals over seeds, differences to random, break-even, and the sentence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raypipe.evaluation.figures import (
    BreakEven,
    SeedInterval,
    paired_difference,
    pooled_margin,
    seed_interval,
    sentence,
)


def test_the_interval_is_students() -> None:
    found = seed_interval([0.5, 0.6, 0.7])
    # t of 2 degrees of freedom at 97.5 % is 4.3027, from a table; the standard deviation is 0.1
    assert found.mean == pytest.approx(0.6) and found.count == 3
    assert found.high is not None and found.high - found.mean == pytest.approx(
        4.30265 * 0.1 / math.sqrt(3), rel=1e-4
    )
    assert seed_interval([0.5]) == SeedInterval(0.5, None, None, 1)


def test_differences_are_paired_by_seed() -> None:
    # seeds differ a lot and lists by a constant: unpaired, nothing could be concluded
    random = {0: 0.3, 1: 0.6, 2: 0.9}
    better = paired_difference(
        {seed: value + 0.01 + 0.001 * seed for seed, value in random.items()}, random
    )
    assert better is not None and better.verdict == "better" and better.mean == pytest.approx(0.011)
    worse = paired_difference({1: 0.5, 2: 0.801, 7: 1.0}, random)
    assert worse is not None and worse.count == 2 and worse.verdict == "worse"
    level = paired_difference({0: 0.4, 1: 0.5}, random)
    assert level is not None and level.verdict == "not told apart"
    one = paired_difference({0: 0.4}, random)
    assert one is not None and one.verdict == "unknown"
    assert paired_difference({8: 0.4}, random) is None


def test_the_pooled_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = [
        abs(groups.mean(1)[0]) < pooled_margin(groups.tolist())
        for groups in random.normal(size=(400, 20, 3))
    ]
    assert 0.92 < np.mean(covered) < 0.98
    assert math.isnan(pooled_margin([[0.1], [0.2]]))


def test_break_even() -> None:
    assert BreakEven("CPU", 40.0, 100.0).as_dict() == {
        "unit": "CPU",
        "saved": 40.0,
        "scoring": 100.0,
        "net": -60.0,
        "trainings": 3,
    }
    assert BreakEven("CPU", 100.0, 40.0).trainings == 1
    assert BreakEven("CPU", -1.0, 40.0).trainings is None


def test_the_sentence_says_plainly_whether_to_prune() -> None:
    worse, better, level = (
        SeedInterval(-0.1, -0.2, -0.05, 3),
        SeedInterval(0.1, 0.05, 0.2, 3),
        SeedInterval(0.0, -0.1, 0.1, 3),
    )
    assert (
        sentence({0.5: worse, 0.3: worse}, "moso, top")
        == "moso, top: worse than random at 0.3 and 0.5: do not prune with it"
    )
    both = sentence({0.1: worse, 0.5: level, 0.9: better}, "x")
    assert (
        both == "x: better than random at 0.9; worse than random at 0.1; "
        "no clear difference from random at 0.5: do not prune with it there"
    )
    assert sentence({0.5: level}, "x").endswith("as far as this shows, a random list does as well")
    assert (
        sentence({0.1: better, 0.3: better, 0.5: better}, "x")
        == "x: better than random at 0.1, 0.3 and 0.5"
    )
    assert "not compared" in sentence({0.5: SeedInterval(0.4, None, None, 1), 0.7: None}, "x")
