"""What changed, and when a refresh is advised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raypipe.config import NightlySettings, TrustSettings, parse_config
from raypipe.errors import ConfigError
from raypipe.nightly.policy import (
    Assessment,
    ListedFragment,
    NewFidelity,
    new_fidelity,
    refresh_reasons,
    source_changes,
)


def test_what_changed() -> None:
    before = [
        ListedFragment("a-1", "a", 10),
        ListedFragment("a-2", "a", 5),
        ListedFragment("b-1", "b", 7),
        ListedFragment("c-1", "c", 3),
    ]
    after = [
        ListedFragment("a-1", "a", 10),
        ListedFragment("a-3", "a", 6),
        ListedFragment("c-1", "c", 3),
        ListedFragment("d-1", "d", 9),
        ListedFragment("e-1", "e", 0),
    ]
    assert source_changes(before, after, new=10, changed=4, removed=12).as_json() == {
        "files": {"new": 2, "changed": 1, "removed": 1},
        "samples": {"new": 10, "changed": 4, "removed": 12, "total": 28},
    }
    assert source_changes(before, before).files == {"new": 0, "changed": 0, "removed": 0}


def scores(seed: int, count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = random.normal(size=count)
    return truth + noise * random.normal(size=count), truth


def test_a_fall_of_the_fidelity_is_told_from_chance() -> None:
    good, bad = scores(0, 300, 0.3), scores(1, 200, 3.0)
    same = [new_fidelity(*scores(number, 200, 0.3), good, 0) for number in range(2, 22)]
    assert sum(fidelity.fall_interval[1] < 0 for fidelity in same) <= 1
    fell = new_fidelity(*bad, good, 0)
    assert fell.first > 0.9 and fell.fall == pytest.approx(fell.spearman - fell.first)
    assert fell.fall_interval[0] < fell.fall < fell.fall_interval[1] < 0
    alone = new_fidelity(*bad, None, 0)
    assert alone.fall is None and alone.spearman == fell.spearman
    assert new_fidelity(np.ones(5), np.ones(5), good, 0).spearman is None
    note = new_fidelity(np.ones(1), np.ones(1), good, 0).note
    assert note == "no rank correlation can be computed from 1 measured new samples"
    assert NewFidelity.from_json(fell.as_json()) == fell
    assert NewFidelity(note="why").as_json() == {"n": 0, "spearman": None, "note": "why"}


def advised(manifest: dict[str, Any], trust: float = 0.2, **settings: Any) -> list[str]:
    """First words of the reasons for a refresh, given part of a manifest."""
    full = {"drift": None, "fidelity": None, "share_since_seed": 0.0, **manifest}
    reasons = refresh_reasons(
        Assessment.from_json(full), NightlySettings(**settings), TrustSettings(min_spearman=trust)
    )
    return [reason.partition(":")[0] for reason in reasons]


def drift(low: float) -> dict[str, Any]:
    return {
        "tonight": {
            "n_new": 90,
            "n_old": 90,
            "auc": low + 0.1,
            "auc_interval": [low, low + 0.2],
            "farther": 0.5,
            "farther_interval": [0.4, 0.6],
            "note": "",
        }
    }


def test_when_a_refresh_is_advised() -> None:
    fine = {"n": 100, "spearman": 0.5, "first": 0.5, "fall": 0.0, "fall_interval": [-0.1, 0.1]}
    assert advised({"drift": None, "fidelity": None, "share_since_seed": 0.0}) == []
    assert advised({"drift": drift(0.6), "fidelity": fine, "share_since_seed": 0.5}) == []
    assert (
        advised({"drift": drift(0.7)}) == ["drift"]
        and advised({"drift": drift(0.7)}, max_drift=1) == []
    )
    assert advised({"drift": drift(0.6)}, max_drift=0.55) == ["drift"]
    assert advised({"fidelity": {**fine, "spearman": 0.1}}) == ["fidelity"]
    assert advised({"fidelity": {**fine, "spearman": 0.1}}, trust=-1) == []
    assert advised({"fidelity": {**fine, "fall": -0.2, "fall_interval": [-0.3, -0.1]}}) == [
        "fidelity"
    ]
    assert advised({"fidelity": {**fine, "spearman": 0.1, "n": 29}}) == [], "too few to say"
    assert (
        advised({"share_since_seed": 0.6}) == ["growth"]
        and advised({"share_since_seed": 0.6}, max_new_share=1) == []
    )


@pytest.mark.parametrize(
    "change",
    [
        {"audit": -1},
        {"drift_samples": 99},
        {"max_drift": 0.4},
        {"max_new_share": 0},
        {"keep_snapshots": 0},
        {"keep_days": 0},
    ],
)
def test_settings_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"nightly.{next(iter(change))}"):
        parse_config({"run": "r", "source": {"uri": "u"}, "nightly": change})
