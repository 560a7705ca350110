"""Gains over random lists, on simulated trainings: how often they are wrong, and how often found."""

from __future__ import annotations

import numpy as np
import pytest

from raypipe.assessment.accuracy_curve import fit_accuracy
from raypipe.assessment.gains import BETTER, NO_EVIDENCE, WORSE, Gain, best_choice, fit_gains
from raypipe.assessment.pilot_trend import PilotTrend

SIMULATIONS = 1000
KEEP = np.tile([0.2, 0.35, 0.6], 2)
POSITIONS = np.log2(KEEP * np.repeat([100.0, 50.0], 3))
"""log2 of the samples kept of each class: three keep fractions at two sizes."""
LINE = np.stack([np.ones_like(POSITIONS), POSITIONS], 1)
SOURCE = 1000.0
"""Samples of each class in the source."""


def simulated(
    draw: np.random.Generator,
    gain: np.ndarray,
    repeats: int,
    tested: int,
    *,
    of_training: float = 0.015,
    of_sample: float = 0.15,
) -> np.ndarray:
    """Differences of right and wrong, [kinds, cells, repeats, tested].

    Test samples differ in how likely they are solved, also in what a list does for them; trainings
    differ by luck; the random list of a repeat is shared by all kinds. `gain` is [kinds, cells].
    """
    kinds, cells = gain.shape
    ease = draw.uniform(0.1, 0.9, tested)
    luck = of_training * draw.normal(size=(kinds + 1, cells, repeats, 1))
    taste = of_sample * draw.normal(size=(kinds + 1, 1, 1, tested))
    shift = np.concatenate([np.zeros((1, cells)), gain])[:, :, None, None]
    correct = draw.random((kinds + 1, cells, repeats, tested)) < ease + luck + taste + shift
    return correct[1:].astype(np.int8) - correct[:1].astype(np.int8)


def share_chosen(gain: np.ndarray, repeats: int, simulations: int, tested: int = 200) -> float:
    """How often any list of 30 % of the source counts as better than random."""
    draw, chosen = np.random.default_rng(1), 0
    cells = (len(KEEP), repeats, tested)
    for _ in range(simulations):
        difference = simulated(draw, gain, repeats, tested)
        lists = {str(kind): values for kind, values in enumerate(difference)}
        trend = PilotTrend.fit(np.zeros(cells, np.int8), lists, KEEP, 2**POSITIONS)
        chosen += best_choice(trend.gains(0.3, 0.3 * SOURCE)) is not None
    return chosen / simulations


@pytest.mark.parametrize("slope", [0.0, -0.03])
def test_without_a_gain_a_list_is_chosen_in_at_most_one_of_twenty(slope: float) -> None:
    """Neither where lists never help, nor where they help small sets and not large ones."""
    gain = np.tile(slope * (1 - KEEP) * (POSITIONS - np.log2(0.3 * SOURCE)), (3, 1))
    assert share_chosen(gain, 4, SIMULATIONS) <= 0.05


def test_a_curved_trend_is_not_taken_for_certainty() -> None:
    """The gain ends at a size that the line does not know of: the scatter of cells tells."""
    gain = np.tile(np.where(POSITIONS < 4.5, 0.08, 0.0), (3, 1))
    assert share_chosen(gain, 6, 200) <= 0.05


def test_power_grows_with_gain_and_with_repeats() -> None:
    power = {
        (gain, repeats): share_chosen(np.full((3, 6), gain), repeats, 200, tested=400)
        for gain in (0.03, 0.1, 0.2)
        for repeats in (3, 12)
    }
    assert power[0.03, 3] <= power[0.1, 3] <= power[0.2, 3]
    assert power[0.2, 12] > 0.9 and power[0.1, 12] > power[0.1, 3]


def test_one_cell_is_a_mean_with_both_errors() -> None:
    """With many trainings the test samples remain, with many test samples the trainings."""
    draw, one = np.random.default_rng(0), np.ones((1, 1))
    for repeats, tested, expected in ((200, 50, 0.15 * 2**0.5 / 50**0.5), (4, 20_000, 0.0106)):
        errors = [
            fit_gains(simulated(draw, np.zeros((1, 1)), repeats, tested), one)[0].at(1).error
            for _ in range(20)
        ]
        assert np.mean(errors) == pytest.approx(expected, rel=0.35)


def test_means_and_lines_are_those_of_least_squares() -> None:
    draw = np.random.default_rng(0)
    difference = simulated(draw, np.full((2, 6), 0.05), 5, 300)
    models = fit_gains(difference, LINE)
    for kind, model in enumerate(models):
        slope, level = np.polyfit(POSITIONS, difference[kind].mean((1, 2)), 1)
        assert model.coefficients == pytest.approx([level, slope])
        assert model.at(1, 5.0).mean == pytest.approx(level + 5 * slope)
        assert model.at(1, 20.0).error > model.at(1, 7.0).error > model.at(1, 4.6).error
    with pytest.raises(ValueError, match="two repeats"):
        fit_gains(difference[:, :, :1], LINE)
    with pytest.raises(ValueError, match="two test samples"):
        fit_gains(np.ones((1, 1, 3, 1)), np.ones((1, 1)))


def test_more_choices_need_more_evidence_and_the_surest_is_taken() -> None:
    assert Gain(0.02, 0.01, 100, choices=1).verdict == BETTER
    assert Gain(0.02, 0.01, 100, choices=10).verdict == NO_EVIDENCE
    assert Gain(-0.05, 0.01, 100, choices=10).verdict == WORSE
    sure, lucky = Gain(0.03, 0.005, 100, 2), Gain(0.06, 0.025, 100, 2)
    assert best_choice({"lucky": lucky, "sure": sure}) == "sure"
    assert best_choice({"lucky": Gain(0.06, 0.05, 100, 2)}) is None
    assert Gain(0.02, 0.01, 1e9).interval == pytest.approx((0.0004, 0.0396), abs=1e-4)


def test_the_accuracy_of_larger_sets_follows_the_power_law() -> None:
    draw, position = np.random.default_rng(0), np.array([2.0, 3.0, 4.0, 5.0])
    correct = draw.random((4, 30, 2000)) > (0.8 * 2 ** (-0.2 * position))[:, None, None]
    curve = fit_accuracy(correct, position)
    accuracy, low, high = curve.accuracy(7.0)
    assert low < accuracy < high and accuracy == pytest.approx(1 - 0.8 * 2**-1.4, abs=0.01)
    gap, low, high = curve.gap(7.0, 6.0)
    assert low < gap < high and gap == pytest.approx(0.8 * (2**-1.2 - 2**-1.4), abs=0.01)
    # more samples never hurt
    assert fit_accuracy(correct[::-1], position).gap(7.0, 6.0)[0] == 0
