"""The gate and the verdict go by the fidelity within classes where lists are cut within them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raypipe.assessment.fidelity import accuracy_figures
from raypipe.config import TrustSettings
from raypipe.config.select import SelectSettings
from raypipe.errors import TrustError
from raypipe.report.verdict import trust_verdict
from raypipe.runs.ledger import StageRecord
from raypipe.runs.status import fidelity_sentence
from raypipe.stages.select.gate import check_trust
from raypipe.text import HeadlineFidelity, weak_proxy

FIGURES: dict[str, Any] = {
    "spearman": 0.9,
    "spearman_interval": [0.85, 0.93],
    "spearman_within": 0.3,
    "spearman_within_interval": [0.15, 0.45],
    "n_held": 200,
    "judged_on": "audit",
}


def record(**changes: Any) -> StageRecord:
    """The record of `extrapolate` with these figures."""
    made = StageRecord(state="done")
    made.samples, made.detail = 1000, {"fidelity": {**FIGURES, **changes}, "measured": 100}
    return made


STABLE = {"value": 0.9}


def test_the_gate_goes_by_the_figure_within_classes() -> None:
    trust = TrustSettings()
    assert check_trust(record(), trust, False) == {
        "spearman": "0.9000",
        "spearman_low": "0.8500",
        "forced": "false",
    }
    with pytest.raises(TrustError, match=r"within classes of 0\.30 .*over all classes it is 0\.90"):
        check_trust(record(), trust, False, within_classes=True)
    forced = check_trust(record(), trust, True, within_classes=True)
    assert forced == {
        "spearman": "0.3000",
        "spearman_low": "0.1500",
        "forced": "true",
        "spearman_all": "0.9000",
    }
    # a run of version 0.2.0, or without labels
    old = record(spearman_within=None, spearman_within_interval=None)
    assert check_trust(old, trust, False, within_classes=True)["spearman"] == "0.9000"


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        ({}, True),
        ({"strategy": "top"}, False),
        ({"strategy": "top", "by_class": True}, True),
        ({"strategy": "ccs", "by_class": False}, False),
        ({"strategy": "balanced"}, True),
    ],
)
def test_which_lists_are_cut_within_classes(settings: dict[str, Any], within: bool) -> None:
    assert SelectSettings.model_validate(settings).cuts_within_classes == within


def test_the_verdict_goes_by_the_same_figure() -> None:
    assert trust_verdict(FIGURES, STABLE, 900)[0] == "strong"
    name, sentence = trust_verdict({**FIGURES, "within_classes": True}, STABLE, 900)
    assert name == "modest"
    assert "within classes, as the keep-lists are cut (0.90 over all classes)" in sentence
    assert fidelity_sentence(FIGURES, True).startswith(
        "Spearman 0.30 within classes (95 % interval 0.15 to 0.45), 0.90 over all"
    )
    assert fidelity_sentence(FIGURES).startswith("Spearman 0.90 (95 % interval 0.85 to 0.93)")
    assert HeadlineFidelity.of({}, True).spearman is None


def test_a_proxy_that_knows_nothing_is_weak() -> None:
    blind = {**FIGURES, "proxy_accuracy": 0.12, "proxy_chance": 0.1}
    name, sentence = trust_verdict(blind, STABLE, 900)
    assert name == "weak" and "hardly beats chance" in sentence
    assert "Do not prune by these scores." in sentence and "accuracy 12 %" in sentence
    for stability in (STABLE, {}):  # a score that every sample has is no better
        assert trust_verdict({**blind, "judged_on": "direct"}, stability, 0)[0] == "weak"
    seeing = {**blind, "proxy_accuracy": 0.5}
    assert trust_verdict(seeing, STABLE, 900)[0] == "strong" and not weak_proxy(seeing)
    assert (
        "accuracy 50 % on 200 samples that it was not trained on; always guessing the largest "
        in (trust_verdict(seeing, STABLE, 900)[1])
    )
    # 100 classes: 10 % is far above chance
    assert not weak_proxy({"proxy_accuracy": 0.1, "proxy_chance": 0.02, "n_held": 200})
    # 52 of 100 by chance
    assert weak_proxy({"proxy_accuracy": 0.58, "proxy_chance": 0.5, "n_held": 100})
    assert not weak_proxy({"proxy_accuracy": 0.7, "proxy_chance": 0.5, "n_held": 100})
    assert not weak_proxy({})
    with pytest.raises(TrustError, match="hardly beats chance"):
        check_trust(
            record(spearman_interval=[0.0, 1.0], proxy_accuracy=0.1, proxy_chance=0.1),
            TrustSettings(),
            False,
        )


def test_no_lists_are_cut_by_a_proxy_that_learned_nothing() -> None:
    # 598 of 600 samples were predicted to be of one of three classes
    blind = {"proxy_accuracy": 0.335, "proxy_chance": 1 / 3, "n_held": 600}
    blind["proxy_balanced"] = {"accuracy": 0.337, "chance": 1 / 3, "error": 0.02}
    direct = {"fidelity": {"judged_on": "direct", **blind}, "measured": 1000, "stability": STABLE}
    untrained = StageRecord(state="done", samples=1000, detail=direct)
    with pytest.raises(TrustError, match=r"accuracy 34 %.*trust\.min_accuracy_over_chance"):
        check_trust(untrained, TrustSettings(), False)
    assert check_trust(untrained, TrustSettings(), True)["forced"] == "true"
    off = TrustSettings(min_accuracy_over_chance=-1)
    assert check_trust(untrained, off, False)["forced"] == "false"
    untrained.detail["fidelity"]["proxy_accuracy"] = 0.5  # a quarter of the way to 1
    assert check_trust(untrained, TrustSettings(), False)["forced"] == "false"
    with pytest.raises(TrustError):
        check_trust(untrained, TrustSettings(min_accuracy_over_chance=0.3), False)


def test_a_proxy_that_finds_rare_classes_is_not_called_blind() -> None:
    """97 % of the samples are of one class, which is no easier to beat by being right."""
    label = np.repeat([0, 1], [970, 30])
    always = accuracy_figures(label, label == 0)
    assert always["proxy_accuracy"] == always["proxy_chance"] == 0.97
    assert always["proxy_balanced"]["accuracy"] == 0.5 and weak_proxy({"n_held": 1000, **always})
    found = label == 0
    found[:20], found[970:990] = False, True  # 20 false alarms, two thirds of the rare class
    assert not weak_proxy({"n_held": 1000, **accuracy_figures(label, found)})
