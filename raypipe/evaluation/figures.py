"""What trainings show together: intervals, differences to random lists, break-even, sentences.

No Ray, no storage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
BETTER, WORSE, UNCLEAR, UNKNOWN = "better", "worse", "not told apart", "unknown"
"""What the interval of a difference to random lists shows.

It is above 0, below 0, or includes 0; with a single seed there is no interval. The words are part
of `evaluation/summary.json`.
"""


@dataclass(frozen=True)
class SeedInterval:
    """A mean over seeds and its 95 % interval.

    Attributes
    ----------
    mean
        Of `count` values.
    low, high
        Student's t interval with count - 1 degrees of freedom; None for fewer than two values.
    count
        Number of values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def verdict(self) -> str:
        """What the interval of a difference shows."""
        if self.low is None or self.high is None:
            return UNKNOWN
        return BETTER if self.low > 0 else WORSE if self.high < 0 else UNCLEAR

    def as_dict(self) -> dict[str, Any]:
        """Return the interval as `evaluation/summary.json` has it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "seeds": self.count}


def seed_interval(values: Sequence[float]) -> SeedInterval:
    """Return mean and interval of one or more values."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return SeedInterval(mean, None, None, count)
    margin = float(
        stdtrit(count - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1) / math.sqrt(count)
    )
    return SeedInterval(mean, mean - margin, mean + margin, count)


def paired_difference(
    values: Mapping[int, float], others: Mapping[int, float]
) -> SeedInterval | None:
    """Return values - others, paired by seed; None if they have no seed in common."""
    seeds = sorted(set(values) & set(others))
    return seed_interval([values[seed] - others[seed] for seed in seeds]) if seeds else None


def pooled_margin(groups: Sequence[Sequence[float]]) -> float:
    """Return half the width of the 95 % interval of a mean over seeds, from several groups.

    The groups are assumed to have the same spread: sqrt(sum of squares within groups / degrees of
    freedom) / sqrt(values in a group), by Student's t with the degrees of freedom of all groups
    together. With two or three values in a group, its own interval would be wide by chance. Groups
    of unequal size count with the mean size. NaN if no group has two values.
    """
    usable = [np.asarray(group, float) for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in usable)
    if not freedom:
        return math.nan
    variance = sum(float(np.square(group - group.mean()).sum()) for group in usable) / freedom
    size = float(np.mean([len(group) for group in usable]))
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2) * math.sqrt(variance / size))


@dataclass(frozen=True)
class BreakEven:
    """What a training on a list saves, compared with the cost of the scores.

    Attributes
    ----------
    unit
        CPU or GPU: the kind of seconds.
    saved
        Seconds of a training on everything, minus those on the list.
    scoring
        Seconds of all stages up to the scores.
    """

    unit: str
    saved: float
    scoring: float

    @property
    def net(self) -> float:
        """Seconds gained (or lost) if the list is used for one training."""
        return self.saved - self.scoring

    @property
    def trainings(self) -> int | None:
        """Trainings on the list that pay for the scores; None if a training saves nothing."""
        return max(1, math.ceil(self.scoring / self.saved)) if self.saved > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as `evaluation/summary.json` has them."""
        return {
            "unit": self.unit,
            "saved": self.saved,
            "scoring": self.scoring,
            "net": self.net,
            "trainings": self.trainings,
        }


_PHRASES = {
    BETTER: "better than random at {}",
    WORSE: "worse than random at {}",
    UNCLEAR: "no clear difference from random at {}",
    UNKNOWN: "not compared with random over several seeds at {}",
}


def sentence(differences: Mapping[float, SeedInterval | None], name: str = "the list") -> str:
    """Return whether a list beats random lists, such as "x: worse than random at 0.3 and 0.5".

    Parameters
    ----------
    differences
        By keep fraction, the difference to random lists.
    name
        What the list is called.
    """
    by_verdict: dict[str, list[float]] = {}
    for fraction in sorted(differences):
        difference = differences[fraction]
        verdict = UNKNOWN if difference is None else difference.verdict
        by_verdict.setdefault(verdict, []).append(fraction)
    phrases = [
        phrase.format(_listed(by_verdict[verdict]))
        for verdict, phrase in _PHRASES.items()
        if verdict in by_verdict
    ]
    if not phrases:
        return f"{name}: nothing was compared"
    return f"{name}: {'; '.join(phrases)}{_advice(by_verdict)}"


def _advice(by_verdict: Mapping[str, Sequence[float]]) -> str:
    if WORSE in by_verdict:
        everywhere = set(by_verdict) == {WORSE} or len(by_verdict[WORSE]) > 1
        return ": do not prune with it" if everywhere else ": do not prune with it there"
    if BETTER not in by_verdict and UNCLEAR in by_verdict:
        return ": as far as this shows, a random list does as well"
    return ""


def _listed(fractions: Sequence[float]) -> str:
    """Return "0.3, 0.5 and 0.7"."""
    texts = [f"{fraction:g}" for fraction in fractions]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
