"""`raypipe.testing.check_score` accepts sound scores and names what is broken in others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import BaseModel, Field

from raypipe.config.base import Settings
from raypipe.scores.base import Score
from raypipe.scores.trajectory import Trajectory
from raypipe.testing import ContractError, check_score

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plugin"


class Doubt(Score):
    summary = "mean probability of all classes but the label"
    reads = ("loss",)
    high_is_hard = True

    def score(self, trajectory: Trajectory) -> np.ndarray:
        return 1 - trajectory.label_probability.mean(0)


class Window(Settings):
    window: int = Field(2, ge=1, description="Epochs.")


def test_accepts_a_sound_score() -> None:
    check_score(Doubt)


def test_accepts_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    from raypipe_example.late_doubt import LateDoubt

    check_score(LateDoubt)
    check_score(LateDoubt, epochs=7)
    with pytest.raises(ContractError, match=r"LateDoubt: options: epochs: 0 is not allowed"):
        check_score(LateDoubt, epochs=0)


class TwoLines(Doubt):
    summary = "two\nlines"


class Undescribed(Doubt):
    class Options(Settings):
        window: int = 2


class Lenient(Doubt):
    class Options(BaseModel):  # type: ignore[assignment]
        window: int = 2


class ReadsLogits(Doubt):
    reads = ("logits",)


class ReadsText(Doubt):
    reads = "loss"  # type: ignore[assignment]


class ReadsTooLittle(Doubt):
    reads = ("margin",)


class ReturnsList(Doubt):
    def score(self, trajectory: Trajectory) -> Any:
        return super().score(trajectory).tolist()


class PerEpoch(Doubt):
    def score(self, trajectory: Trajectory) -> np.ndarray:
        return trajectory.loss


class Doubles(Doubt):
    def score(self, trajectory: Trajectory) -> np.ndarray:
        return super().score(trajectory).astype(np.float64)


class NotFinite(Doubt):
    def score(self, trajectory: Trajectory) -> np.ndarray:
        values = super().score(trajectory)
        values[:2] = np.nan, np.inf
        return values


class Raises(Doubt):
    def score(self, trajectory: Trajectory) -> np.ndarray:
        raise IndexError("no such epoch")


class Noisy(Doubt):
    random = np.random.default_rng(0)

    def score(self, trajectory: Trajectory) -> np.ndarray:
        noise = self.random.normal(size=len(trajectory.label)).astype(np.float32)
        return super().score(trajectory) + 0.01 * noise


class GloballyRandom(Doubt):
    def score(self, trajectory: Trajectory) -> np.ndarray:
        np.random.random()
        return super().score(trajectory)


class Ranks(Doubt):
    def score(self, trajectory: Trajectory) -> np.ndarray:
        return np.argsort(np.argsort(super().score(trajectory))).astype(np.float32)


class Overwrites(Doubt):
    def score(self, trajectory: Trajectory) -> np.ndarray:
        values = super().score(trajectory)
        trajectory.loss[:] = 0
        return values


class UpsideDown(Doubt):
    def score(self, trajectory: Trajectory) -> np.ndarray:
        return -super().score(trajectory)


class Undeclared(Doubt):
    high_is_hard = False


class NoScore(Score):
    summary = "nothing"


class NoSummary(Score):
    Options: ClassVar[type[Settings]] = Window

    def score(self, trajectory: Trajectory) -> np.ndarray:
        return trajectory.loss[0]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (dict, "dict: is not a class derived from Score"),
        (NoScore, "NoScore: lacks score"),
        (NoSummary, "NoSummary: has no summary"),
        (TwoLines, "TwoLines: has no summary; give it a text of one line"),
        (Undescribed, "Undescribed: option window has no description"),
        (Lenient, "Lenient: Options is not derived from raypipe.config.base.Settings"),
        (ReadsLogits, "ReadsLogits: reads logits; possible are loss, margin"),
        (ReadsText, "ReadsText: reads is 'loss'; expected a tuple, such as"),
        (ReadsTooLittle, "ReadsTooLittle: reads is incomplete: the trajectory was read without"),
        (ReturnsList, "ReturnsList: score returns list, not an array"),
        (PerEpoch, r"PerEpoch: score returns shape \[40, 240\]; expected \[240\]"),
        (Doubles, "Doubles: score returns float64; expected float32"),
        (NotFinite, "NotFinite: 2 of 240 scores are not finite"),
        (Raises, "Raises: score raises IndexError: no such epoch"),
        (Noisy, "Noisy: the same input gives other scores at a second call"),
        (GloballyRandom, "GloballyRandom: draws from NumPy's global random generator"),
        (Ranks, "Ranks: a score depends on the other samples"),
        (Overwrites, "Overwrites: changes its input loss"),
        (UpsideDown, "UpsideDown: high_is_hard is true, but hard samples score low"),
        (Undeclared, "Undeclared: high scores are those of hard samples"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_names_what_is_broken(part: type[Score], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}") as caught:
        check_score(part)
    assert "\n" not in str(caught.value)
