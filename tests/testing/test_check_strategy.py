"""`raypipe.testing.check_strategy` accepts sound strategies and names what is broken in others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raypipe.selection import Chunk, KeepStrategy, SelectionOptions
from raypipe.selection.base import SelectionPlan, one_group_quota
from raypipe.selection.radix_select import Ranking
from raypipe.testing import ContractError, check_strategy

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plugin"


class Middle(KeepStrategy):
    summary = "nearest to one half"
    kept = "the scores nearest to one half"

    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        return -np.abs(chunk.score - 0.5)


def test_accepts_a_sound_strategy() -> None:
    check_strategy(Middle)


def test_accepts_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    from raypipe_example.uncontradicted import Uncontradicted

    check_strategy(Uncontradicted)
    check_strategy(Uncontradicted, max_loss=0.5)
    with pytest.raises(ContractError, match="options: max_los: unknown setting; did you mean"):
        check_strategy(Uncontradicted, max_los=0.5)


class Idle(KeepStrategy):
    summary = "nothing"
    kept = "nothing"


class Unspoken(Middle):
    kept = ""


class WithoutLoss(Middle):
    def preference(self, chunk: Chunk, options: SelectionOptions) -> Any:
        return -chunk.loss  # type: ignore[operator]


class Single(Middle):
    def preference(self, chunk: Chunk, options: SelectionOptions) -> Any:
        return float(chunk.score[0])


class NotFinite(Middle):
    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        return np.where(chunk.score > 1, np.nan, chunk.score)


class Noisy(Middle):
    random = np.random.default_rng(0)

    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        return self.random.random(len(chunk.score))


class ByChunk(Middle):
    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        return chunk.score - chunk.score.mean()


class Overwrites(Middle):
    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        chunk.score.sort()
        return chunk.score


class IgnoresScores(Middle):
    uses_scores = False


class LooksAtLabels(Middle):
    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        return chunk.score + 10 * chunk.label


class NeverDraws(Middle):
    draws_at_random = True


class Draws(Middle):
    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        return np.sin(1000 * chunk.score + options.seed)


class ByFraction(Middle):
    def plan(self, stream: Any, keep: Any, classes: int, options: Any) -> Any:
        plans = []
        for fraction in keep:
            part = type("Part", (Middle,), {"preference": _near(fraction)})(self.options)
            plans += Middle.plan(part, stream, [fraction], classes, options)
        return plans


def _near(fraction: float) -> Any:
    return lambda self, chunk, options: -np.abs(chunk.score - 2 * fraction)


class OnePlan(Middle):
    def plan(self, stream: Any, keep: Any, classes: int, options: Any) -> Any:
        return super().plan(stream, keep[:1], classes, options)


class NoPlans(Middle):
    def plan(self, stream: Any, keep: Any, classes: int, options: Any) -> Any:
        return None


class ByQuotas(Middle):
    quotas: Any = None

    def plan(self, stream: Any, keep: Any, classes: int, options: Any) -> Any:
        plans = super().plan(stream, keep, classes, options)
        return [replace(plan, quotas=type(self).quotas) for plan in plans]


class QuotasOfText(ByQuotas):
    quotas = staticmethod(lambda size, total: "all")


class QuotasTooLong(ByQuotas):
    quotas = staticmethod(lambda size, total: np.repeat(size, 2))


class Doubled(Ranking):
    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        samples = 2 * len(chunk.score)
        return np.zeros(samples, np.uint32), np.zeros(samples, np.int64)


class GroupSeven(Ranking):
    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        samples = len(chunk.score)
        return np.zeros(samples, np.uint32), np.full(samples, 7)


def _by(ranking: Ranking) -> type[Middle]:
    def plan(self: Any, stream: Any, keep: Any, classes: int, options: Any) -> Any:
        return [SelectionPlan(ranking, one_group_quota)] * len(keep)

    return type(f"By{type(ranking).__name__}", (Middle,), {"plan": plan})


class Words(Middle):
    def preference(self, chunk: Chunk, options: SelectionOptions) -> Any:
        return ["high"] * len(chunk.score)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Idle, "Idle: cutting a list raises ConfigError: .*define preference, or plan"),
        (Unspoken, "Unspoken: kept is empty"),
        (WithoutLoss, "WithoutLoss: cutting a list .*; chunk.loss is None unless needs_loss"),
        (Single, r"Single: cutting a list .*preference has shape \[\]; expected \[128\]"),
        (NotFinite, "NotFinite: cutting a list .*preferences are not finite"),
        (Noisy, "Noisy: the same stream gives another list at a second call"),
        (ByChunk, "ByChunk: the list depends on how the stream is divided into chunks"),
        (Overwrites, "Overwrites: changes its input score"),
        (IgnoresScores, "IgnoresScores: uses_scores is false, but other scores"),
        (LooksAtLabels, "LooksAtLabels: uses_classes is false, but other labels"),
        (NeverDraws, "NeverDraws: draws_at_random is true, but another seed changes nothing"),
        (Draws, "Draws: draws_at_random is false, but another seed gives another list"),
        (ByFraction, "ByFraction: nested is true, but a smaller list is not contained"),
        (OnePlan, "OnePlan: cutting a list .*returned 1 plans for 3 keep fractions"),
        (NoPlans, "NoPlans: cutting a list .*returned a NoneType for 3 keep fractions"),
        (QuotasOfText, r"QuotasOfText: .*quotas is str \[\]; expected int64 \[1\]"),
        (QuotasTooLong, r"QuotasTooLong: .*quotas is int64 \[2\]; expected int64 \[1\]"),
        (_by(Doubled()), r"ByDoubled: .*key is uint32 \[256\]; expected uint32 \[128\]"),
        (_by(GroupSeven()), "ByGroupSeven: .*groups from 7 to 7; expected -1 to 0"),
        (Words, r"Words: cutting a list .*preference has the type <U4; expected float32"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_names_what_is_broken(part: type[KeepStrategy], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}") as caught:
        check_strategy(part)
    assert "\n" not in str(caught.value)
