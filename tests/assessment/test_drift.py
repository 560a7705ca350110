"""How often drift raises an alarm, with and without a shift, and its figures by other means."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from raypipe.assessment.drift import Drift, embedding_drift, label_drift, superiority
from raypipe.errors import RaypipeError

MOST = 0.65


def cloud(seed: int, count: int, shift: float = 0.0, spread: float = 1.0) -> np.ndarray:
    """Embeddings of ten classes in 24 dimensions.

    `shift` moves each along one direction, in units of the spread within a class.
    """
    random, centres = np.random.default_rng(seed), np.random.default_rng(0).normal(0, 2, (10, 24))
    points = centres[random.integers(0, 10, count)] + spread * random.normal(size=(count, 24))
    return (points + shift * np.eye(24)[3]).astype(np.float32)


def drift(number: int, new: int, **changes: float) -> Drift:
    return embedding_drift(
        cloud(3 * number + 1, new, **changes),
        cloud(3 * number + 2, 600),
        cloud(3 * number + 3, 300),
    )


@pytest.mark.parametrize("new", [30, 300])
def test_without_drift_there_is_no_alarm_and_the_intervals_hold_one_half(new: int) -> None:
    drifts = [drift(number, new) for number in range(24)]
    assert not any(item.beyond(MOST) for item in drifts)
    for name in ("auc_interval", "farther_interval"):
        held = np.mean([getattr(item, name)[0] <= 0.5 <= getattr(item, name)[1] for item in drifts])
        assert held >= 0.8, name  # 95 % of 24 are expected
        assert sum(getattr(item, name)[0] > 0.5 for item in drifts) <= 3, name


@pytest.mark.parametrize(
    ("new", "changes"), [(300, {"shift": 1.5}), (300, {"spread": 1.4}), (60, {"shift": 4.0})]
)
def test_a_shift_or_a_wider_spread_is_an_alarm(new: int, changes: dict[str, float]) -> None:
    assert sum(drift(number, new, **changes).beyond(MOST) for number in range(6)) == 6


def test_a_difference_too_small_to_matter_is_no_alarm_however_many_samples_show_it() -> None:
    found = embedding_drift(cloud(1, 4000, shift=0.3), cloud(2, 4000), cloud(3, 300))
    assert found.auc_interval is not None and 0.5 < found.auc_interval[0] < MOST
    assert not found.beyond(MOST) and found.beyond(0.5)


def test_samples_in_one_spot_are_no_farther_and_are_told_all_the_same() -> None:
    centre = np.random.default_rng(0).normal(0, 2, (10, 24))[:1].astype(np.float32)
    found = embedding_drift(np.repeat(centre, 200, axis=0), cloud(2, 600), cloud(3, 300))
    assert found.farther is not None and found.farther < 0.5
    assert found.beyond(MOST) and not found.beyond(1.0)


def test_superiority_is_mann_whitneys_u_and_the_auc() -> None:
    random = np.random.default_rng(0)
    new, old = random.integers(0, 9, 70).astype(float), random.integers(0, 7, 50).astype(float)
    found, (low, high) = superiority(new, old)
    assert found == pytest.approx(mannwhitneyu(new, old).statistic / (70 * 50))
    assert found == pytest.approx(roc_auc_score([1] * 70 + [0] * 50, np.r_[new, old]))
    drawn = [
        roc_auc_score([1] * 70 + [0] * 50, np.r_[random.choice(new, 70), random.choice(old, 50)])
        for _ in range(400)
    ]
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_too_few_samples_say_nothing() -> None:
    for sizes, what in (
        ((29, 600, 300), "29 new"),
        ((300, 29, 300), "29 old"),
        ((300, 600, 5), "5 seed"),
    ):
        found = embedding_drift(*(cloud(number, count) for number, count in enumerate(sizes)))
        assert found.auc is None and what in found.note and not found.beyond(0.5)
    assert Drift.from_dict(drift(0, 40).as_dict()) == drift(0, 40)


def test_what_is_no_set_of_embeddings_is_refused() -> None:
    with pytest.raises(RaypipeError, match=r"old embeddings have shape \[40, 3\]"):
        embedding_drift(cloud(1, 40), cloud(2, 40)[:, :3], cloud(3, 40))
    with pytest.raises(RaypipeError, match="not all finite"):
        embedding_drift(np.full((40, 24), np.nan, np.float32), cloud(2, 40), cloud(3, 40))


def test_label_drift_is_corrected_for_sampling() -> None:
    random = np.random.default_rng(0)
    same = [
        label_drift(random.multinomial(300, [0.01] * 100), random.multinomial(900, [0.01] * 100))
        for _ in range(30)
    ]
    assert np.mean([item["total_variation"] for item in same]) > 0.15, (
        "shares of many classes differ by chance"
    )
    assert np.mean([item["cramers_v"] for item in same]) < 0.05
    apart = label_drift(np.array([50, 0]), np.array([0, 50]))
    assert (apart["total_variation"], apart["cramers_v"]) == (1.0, pytest.approx(1.0, abs=0.02))
    assert label_drift(np.array([20, 9]), np.array([500, 500]))["total_variation"] is None
    assert label_drift(np.array([50]), np.array([50]))["cramers_v"] is None
