"""Shares of the seed set, the audit set and the rest that a list holds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import hypergeom

from raypipe.assessment.membership import set_shares

SETS = {"seed": 2000, "audit": 200, "rest": 7800}


def test_random_lists_are_within_chance_about_99_times_in_100() -> None:
    rng = np.random.default_rng(0)
    member = np.repeat(list(SETS), list(SETS.values()))
    outside = 0
    for _ in range(300):
        held = rng.choice(member, 3000, replace=False)
        kept = {name: int((held == name).sum()) for name in SETS}
        outside += not set_shares(SETS, kept)["seed"].within_chance
    assert outside <= 9


def test_a_list_that_holds_45_percent_of_the_seed_set_and_26_of_the_rest_favours_it() -> None:
    shares = set_shares(SETS, {"seed": 900, "audit": 58, "rest": 2028})
    assert shares["seed"].share == 0.45
    assert not shares["seed"].within_chance
    assert not shares["rest"].within_chance
    assert shares["audit"].within_chance


def test_empty_sets_and_lists_are_within_chance() -> None:
    shares = set_shares({"seed": 10, "audit": 0, "rest": 90}, {"seed": 0, "audit": 0, "rest": 0})
    assert all(share.within_chance for share in shares.values())
    assert shares["audit"].share == 0.0


@pytest.mark.parametrize(
    ("total", "members", "drawn"),
    [
        (10_000, 2000, 3000),
        (50, 7, 49),
        (50, 50, 20),
        (50, 0, 20),
        (50, 10, 0),
        (9, 5, 9),
        (400, 390, 300),
        (1_300_000, 3, 900_000),
        (10_000_000, 500_000, 3_000_000),
    ],
)
@pytest.mark.parametrize("level", [0.5, 0.99])
def test_the_interval_is_that_of_a_hypergeometric_number(
    total: int, members: int, drawn: int, level: float
) -> None:
    rest = total - members
    share = set_shares({"set": members, "rest": rest}, {"set": drawn, "rest": 0}, level)["set"]
    assert (share.low, share.high) == hypergeom(total, members, drawn).interval(level)
