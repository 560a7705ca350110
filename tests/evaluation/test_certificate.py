"""The certificate, on simulated trainings whose true gains are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from raypipe.config import parse_settings
from raypipe.config.evaluate import MIN_CERTIFY_SAMPLES, EvaluateSettings
from raypipe.errors import ConfigError, SourceError
from raypipe.evaluation.certificate import (
    CERTIFIED,
    HARMFUL,
    NO_EVIDENCE,
    VERDICT_EXIT_CODES,
    certificate_lines,
    certify,
)
from raypipe.evaluation.driver import check_test_samples


def simulated(
    draw: np.random.Generator, gains: Sequence[float], seeds: int = 5, tested: int = 2000
) -> dict[float, dict[str, np.ndarray]]:
    """Right and wrong at two fractions; test samples, lists and trainings differ by chance."""
    ease, result = draw.uniform(0.2, 0.8, tested), {}
    for fraction in (0.3, 0.5):
        result[fraction] = {
            name: draw.random((seeds, tested))
            < ease
            + gain
            + 0.01 * draw.normal(size=(seeds, 1))
            + 0.1 * draw.normal(size=(1, tested))
            for name, gain in zip(("random", *"abcd"), (0.0, *gains), strict=False)
        }
    return result


def share(verdict: str, gains: Sequence[float], simulations: int, **sizes: int) -> float:
    draw = np.random.default_rng(0)
    return float(
        np.mean(
            [
                any(
                    item.verdict == verdict
                    for item in certify(simulated(draw, gains, **sizes)).fractions
                )
                for _ in range(simulations)
            ]
        )
    )


@pytest.mark.parametrize("gains", [(0.0,) * 4, (-0.01,) * 4, (0.0, -0.05, -0.05, -0.05)])
@pytest.mark.parametrize("seeds", [3, 6])
def test_nothing_that_does_not_help_is_certified_in_more_than_one_of_twenty(
    gains: tuple[float, ...], seeds: int
) -> None:
    """At any fraction, although the best of four lists is chosen."""
    assert share(CERTIFIED, gains, 250, seeds=seeds, tested=1000) <= 0.05


def test_clear_cases_are_recognised_in_nineteen_of_twenty() -> None:
    for gains, verdict in (((0.0, 0.08, 0.02, -0.05), CERTIFIED), ((-0.1,) * 4, HARMFUL)):
        draw = np.random.default_rng(1)
        right = [certify(simulated(draw, gains)).verdict == verdict for _ in range(60)]
        assert np.mean(right) >= 0.95


def test_the_list_is_chosen_on_one_half_and_tested_on_the_other() -> None:
    draw = np.random.default_rng(0)
    certificate = certify(simulated(draw, (0.0, 0.08, 0.02, -0.05)))
    assert [item.chosen for item in certificate.fractions] == ["b", "b"]
    assert (certificate.choices, certificate.tested) == (8, 1000)
    correct = simulated(draw, (0.0,))
    # whatever is right on the first half only is chosen, and not certified
    for name in ("random", "a"):
        correct[0.3][name] = np.zeros_like(correct[0.3][name])
    order = np.random.default_rng(0x63657274).permutation(2000)
    correct[0.3]["a"][:, order[:1000]] = True
    first = certify(correct).fractions[0]
    assert first.chosen_by == 1.0 and first.gain.mean == 0.0 and first.verdict == NO_EVIDENCE


def test_one_harmful_list_makes_it_harmful_and_one_doubtful_list_leaves_no_evidence() -> None:
    draw = np.random.default_rng(0)
    good, bad, none = (simulated(draw, (gain,)) for gain in (0.1, -0.1, 0.0))
    for other, verdict in ((good, CERTIFIED), (bad, HARMFUL), (none, NO_EVIDENCE)):
        certificate = certify({0.3: good[0.3], 0.5: other[0.5]})
        assert certificate.verdict == verdict
        lines = list(certificate_lines(certificate.as_dict()))
        assert len(lines) == 3 and f"certificate {verdict} " in lines[0]
        assert "keep 0.3: a: certified, +" in lines[1] and f"keep 0.5: a: {verdict}" in lines[2]
    assert VERDICT_EXIT_CODES == {CERTIFIED: 0, NO_EVIDENCE: 5, HARMFUL: 6}


def test_two_seeds_are_too_few() -> None:
    with pytest.raises(ConfigError, match="seeds 3 or more"):
        parse_settings(EvaluateSettings, {"certify": True, "seeds": 2}, "evaluate")
    assert EvaluateSettings(certify=True).seeds == 3


def test_models_that_agree_on_a_few_test_samples_by_chance_are_not_certified() -> None:
    def certified(tested: int) -> float:
        """How often a list is, if trainings differ in nothing and no list is better."""
        draw, names = np.random.default_rng(0), ("random", *"abcd")
        found = []
        for _ in range(200):
            correct = {
                fraction: {name: np.repeat(draw.random((1, tested)) < 0.5, 3, 0) for name in names}
                for fraction in (0.3, 0.5)
            }
            found.append(any(item.verdict == CERTIFIED for item in certify(correct).fractions))
        return float(np.mean(found))

    assert certified(MIN_CERTIFY_SAMPLES) <= 0.05 < certified(5)
    settings = EvaluateSettings(certify=True)
    check_test_samples("data", MIN_CERTIFY_SAMPLES, settings)
    check_test_samples("data", 3, EvaluateSettings())
    with pytest.raises(SourceError, match="data: 19 samples to test on are too few to certify"):
        check_test_samples("data", MIN_CERTIFY_SAMPLES - 1, settings)
