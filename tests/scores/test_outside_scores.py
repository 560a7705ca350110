"""Scores from outside that cannot be used are refused before a training, in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import small_config

from raypipe.errors import ConfigError
from raypipe.plugins import code_allowed
from raypipe.scores.registry import check_scores

SCORES = """
from raypipe.scores.base import Score

class Doubt(Score):
    summary = "mean loss"
    reads = ("loss",)

    def score(self, trajectory):
        return trajectory.loss.mean(0)

class ReadsText(Doubt):
    reads = "loss"

class ReadsLogits(Doubt):
    reads = ("logits",)

class ReadsTooLittle(Doubt):
    reads = ("margin",)

class PlainOptions(Doubt):
    class Options:
        epochs = 3

class NoStart(Doubt):
    def __init__(self, options):
        raise ValueError("no start")

class NotFinite(Doubt):
    def score(self, trajectory):
        return super().score(trajectory) * float("nan")

class Raises(Doubt):
    def score(self, trajectory):
        return trajectory.losses.mean(0)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "scores_beside.py").write_text(SCORES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "scores_beside", raising=False)
    return "scores_beside"


def test_a_sound_score_is_accepted(module: str) -> None:
    with code_allowed():
        check_scores(small_config("runs/x", f"measure.scores=['{module}:Doubt']"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ReadsText", r"reads of 'scores_beside:ReadsText' is 'loss'; expected a tuple, such as"),
        ("ReadsLogits", r"reads of .* is \('logits',\); expected .* some of loss, margin, "),
        ("ReadsTooLittle", "scores_beside:ReadsTooLittle: the trajectory was read without loss"),
        ("PlainOptions", "Options of 'scores_beside:PlainOptions' is not derived from raypipe"),
        ("NoStart", r"scores_beside:NoStart failed \(ValueError: no start, scores_beside.py line"),
        ("NotFinite", "scores_beside:NotFinite: 1 of 1 scores are not finite"),
        ("Raises", r"scores_beside:Raises failed \(AttributeError: .*, scores_beside.py line"),
    ],
)
def test_what_is_wrong_with_a_score_is_one_line(module: str, name: str, message: str) -> None:
    config = small_config("runs/x", f"measure.scores=['{module}:{name}']")
    with code_allowed(), pytest.raises(ConfigError, match=f"^measure.scores: {message}") as caught:
        check_scores(config)
    assert "\n" not in str(caught.value)
