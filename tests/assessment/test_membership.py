"""Shares of the seed set, the audit set and the rest that a list holds."""

from __future__ import annotations

import numpy as np

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
