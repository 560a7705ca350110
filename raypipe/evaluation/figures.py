"""What trainings say together: intervals over seeds, differences to random lists, break-even, and the sentence. No Ray, no storage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95
BEATS, WORSE, LEVEL, UNKNOWN = "better", "worse", "not told apart", "unknown"
"""What the interval of a difference to random says: above 0, below 0, holds 0; one seed alone has no interval."""


@dataclass(frozen=True)
class Interval:
    """The mean of `count` values, and its 95 % interval by Student's t with count - 1 degrees of freedom; None for fewer than two."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def verdict(self) -> str:
        """Of a difference."""
        if self.low is None or self.high is None:
            return UNKNOWN
        return BEATS if self.low > 0 else WORSE if self.high < 0 else LEVEL

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "seeds": self.count}


def interval(values: Sequence[float]) -> Interval:
    """Of one value or more."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    reach = float(
        student.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    )
    return Interval(mean, mean - reach, mean + reach, count)


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """values - others, paired by seed, of the seeds that both have; None where there is none."""
    both = sorted(set(values) & set(others))
    return interval([values[seed] - others[seed] for seed in both]) if both else None


def pooled_reach(groups: Sequence[Sequence[float]]) -> float:
    """Half the width of the 95 % interval of a mean over seeds, from the spread of several groups that is taken to be one.

    sqrt(sum of squares within groups / degrees of freedom), over sqrt(values in a group), by Student's t with the degrees of
    freedom of all groups together: where groups have two or three values each, their own intervals are wide by chance of
    a few. NaN without two values in any group. Groups of unequal size count with the mean size.
    """
    several = [np.asarray(group, float) for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if not freedom:
        return math.nan
    variance = sum(float(np.square(group - group.mean()).sum()) for group in several) / freedom
    size = float(np.mean([len(group) for group in several]))
    return float(student.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance / size))


@dataclass(frozen=True)
class BreakEven:
    """What one training on a list saves against one on everything, beside what the scores cost, all in `unit` seconds.

    saved      seconds of a training on everything less those on the list
    scoring    seconds of all stages up to the scores
    net        saved - scoring: what is won, or lost, where the list is used for one training
    trainings  from so many trainings on the list the scores have paid; None where a training saves nothing
    """

    unit: str
    saved: float
    scoring: float

    @property
    def net(self) -> float:
        return self.saved - self.scoring

    @property
    def trainings(self) -> int | None:
        return max(1, math.ceil(self.scoring / self.saved)) if self.saved > 0 else None

    def as_dict(self) -> dict[str, Any]:
        named = {
            "saved": self.saved,
            "scoring": self.scoring,
            "net": self.net,
            "trainings": self.trainings,
        }
        return {"unit": self.unit, **named}


def sentence(differences: Mapping[float, Interval | None], name: str = "the list") -> str:
    """Whether a list beats random at each fraction, plainly; by keep fraction the difference to random.

    "better than random at 0.7; worse than random at 0.3 and 0.5: do not prune with it at these".
    """
    by_verdict: dict[str, list[float]] = {}
    for fraction in sorted(differences):
        found = differences[fraction]
        by_verdict.setdefault(UNKNOWN if found is None else found.verdict, []).append(fraction)
    words = {
        BEATS: "better than random at {}",
        WORSE: "worse than random at {}",
        LEVEL: "not told apart from random at {}",
        UNKNOWN: "not compared with random over several seeds at {}",
    }
    parts = [
        text.format(_listed(by_verdict[verdict]))
        for verdict, text in words.items()
        if verdict in by_verdict
    ]
    if not parts:
        return f"{name}: nothing was compared"
    text = f"{name}: " + "; ".join(parts)
    if WORSE in by_verdict:
        everywhere = set(by_verdict) == {WORSE}
        return text + (
            ": do not prune with it"
            if everywhere or len(by_verdict[WORSE]) > 1
            else ": do not prune with it there"
        )
    if BEATS not in by_verdict and LEVEL in by_verdict:
        return text + ": a random list does as well, as far as this can tell"
    return text


def _listed(fractions: Sequence[float]) -> str:
    """0.3, 0.5 and 0.7"""
    texts = [f"{fraction:g}" for fraction in fractions]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
