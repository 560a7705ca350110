"""The verdict on the scores of a run, and its sentences."""

from __future__ import annotations

import pytest

from raypipe.report.verdict import experimental, trust_verdict


@pytest.mark.parametrize(
    ("spearman", "verdict"),
    [
        (-0.3, "weak"),
        (0.19, "weak"),
        (0.2, "modest"),
        (0.49, "modest"),
        (0.5, "good"),
        (0.79, "good"),
        (0.8, "strong"),
        (1.0, "strong"),
    ],
)
def test_verdicts(spearman: float, verdict: str) -> None:
    name, text = trust_verdict({"spearman": spearman, "n_held": 40}, {"value": 1.0}, 100)
    assert name == verdict
    assert text.startswith(f"Trust in these scores is {verdict}. Fidelity ")
    assert "measured scores on 40 seed samples held out of the fit" in text
    assert ("Do not prune" in text) == (verdict == "weak")


def test_no_score_is_strong_that_another_training_may_not_agree_with() -> None:
    assert trust_verdict({"spearman": 0.95}, {"value": 0.85}, 100)[0] == "strong"
    assert trust_verdict({"spearman": 0.95}, {"value": 0.6}, 100)[0] == "good"
    assert trust_verdict({"spearman": 0.95}, {"value": 0.1}, 100)[0] == "weak"
    name, text = trust_verdict({"spearman": 0.95}, {"note": "only one proxy"}, 100)
    assert name == "good"
    assert "Stability is unknown: only one proxy." in text


def test_an_experimental_score_is_called_so() -> None:
    assert "moso is an experimental score: two trainings agreed to less than 0.6" in experimental(
        "moso"
    )
    assert experimental("loss") == "" == experimental(None)


def test_a_baseline_that_does_as_well_is_named() -> None:
    rivals = {"knn": {"spearman": 0.75}, "random": {"spearman": None}}
    assert (
        "“knn” does as well here (0.75)"
        in trust_verdict({"spearman": 0.7, "baselines": rivals}, {}, 10)[1]
    )
    assert "does as well" not in trust_verdict({"spearman": 0.8, "baselines": rivals}, {}, 10)[1]
    itself = {
        "spearman": 0.7,
        "method": "knn-published",
        "baselines": {"knn_published": {"spearman": 0.7}},
    }
    assert "does as well" not in trust_verdict(itself, {}, 10)[1]


def test_a_fully_measured_source_needs_no_fidelity() -> None:
    assert trust_verdict({"spearman": 0.1}, {}, 0)[0] == "measured"
