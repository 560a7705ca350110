"""How well the scores would agree with those of another training of all proxies.

Several proxies score each sample. Their scores are compared in halves: of m comparable columns,
the mean over one half and that over another have a rank correlation r, averaged over splits. The
Spearman-Brown formula steps it up to the mean over all m:

    stability = f r / (1 + (f - 1) r),    f = m / (columns in a half)

(Spearman 1910; Brown 1910). It assumes that all columns are equally good. There are two kinds of
columns:

- With cross-fitting (`raypipe.runs.proxy_roles`), the proxies that score a sample were trained on
  disjoint parts of the seed set. Two of them have no more in common than two trainings on two seed
  sets. The repeats of a part share its samples, so they are averaged first: a column is a part, and
  m is the number of parts that score a sample. The stability is that with a run with another seed
  set.
- Otherwise the proxies that score a sample are repeats, trained on the same samples: a column is a
  repeat. The stability is that with another training on the same seed set. It does not show what
  another seed set would change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from raypipe.assessment.rank_agreement import (
    MIN_SAMPLES,
    BootstrapInterval,
    RanksWithinClasses,
    bootstrap_interval,
    resample_weights,
)

MAX_SAMPLES = 20_000
"""Samples that are compared of a larger set, the first ones: more would not narrow the interval
visibly."""
MAX_SPLITS = 20
"""Largest number of splits into halves to compare. Where there are more, this many are drawn."""


@dataclass(frozen=True)
class Agreement:
    """Agreement to expect with another training, for one way of ranking.

    Attributes
    ----------
    value : float
        Rank correlation to expect between the mean scores of two runs.
    interval : tuple of float or None
        Its 95 % bootstrap interval over samples.
    single : float
        Mean rank correlation of two columns: proxies, or means over the repeats of a part.
    """

    value: float
    interval: BootstrapInterval | None
    single: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Agreement:
        """Restore what `dataclasses.asdict` returned, also after JSON."""
        return cls(data["value"], _pair(data["interval"]), data["single"])


@dataclass(frozen=True)
class Stability:
    """Agreement of the scores with those of another training.

    Attributes
    ----------
    value : float or None
        Rank correlation to expect between the mean scores of two runs; None when it is unknown. It
        is that of `within` or `over_all`, whichever `within_classes` names.
    interval : tuple of float or None
        Its 95 % bootstrap interval over samples.
    single : float or None
        Mean rank correlation of two columns, see `Agreement`.
    proxies : int
        Proxies whose scores are averaged for a sample.
    samples : int
        Samples compared.
    within_classes : bool
        Whether ranks are those within the class of a sample.
    note : str
        Why the value is unknown; else empty.
    same_samples : bool
        Whether the proxies compared were trained on the same samples: the agreement is with another
        training on the same seed set, and not with that on another.
    over_all, within : Agreement or None
        Figures over all samples, and within classes. None if unknown, or in older runs.
    """

    value: float | None = None
    interval: BootstrapInterval | None = None
    single: float | None = None
    proxies: int = 1
    samples: int = 0
    within_classes: bool = False
    note: str = ""
    same_samples: bool = False
    over_all: Agreement | None = None
    within: Agreement | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stability:
        """Restore what `as_dict` returned; figures of older runs lack some keys."""
        values = {**data, "interval": _pair(data.get("interval"))}
        for name in ("over_all", "within"):
            values[name] = Agreement.from_dict(data[name]) if data.get(name) else None
        return cls(**values)


def spearman_brown(correlation: float, count: float) -> float:
    """Return the correlation of two means over `count` measurements, from that of single ones."""
    return count * correlation / (1 + (count - 1) * correlation)


def stability(
    by_proxy: np.ndarray, label: np.ndarray, seed: int, within_classes: bool = False, parts: int = 1
) -> Stability:
    """Compare the scores that several proxies gave the same samples.

    Parameters
    ----------
    by_proxy
        Scores on a common scale, float [n, proxies]; NaN where a proxy does not score the sample.
        With P parts, column r P + p is the proxy of part p in repeat r.
    label
        Classes, int [n]; -1 without.
    seed
        Seed of the bootstrap and of the splits.
    within_classes
        Whether keep-lists are cut within classes: whose figures `Stability.value` repeats.
    parts
        Number of parts of the seed set, P.

    Returns
    -------
    Stability
        Has a note instead of a value if there is nothing to compare.
    """
    by_proxy, label = by_proxy[:MAX_SAMPLES], label[:MAX_SAMPLES]
    count, averaged = len(by_proxy), int(np.isfinite(by_proxy).sum(1).max(initial=0))
    if averaged < 2:
        note = "each sample was scored by one proxy only; set proxy.repeats to 2 or more to know it"
        return Stability(proxies=1, samples=count, note=note)
    by_repeat = by_proxy.reshape(count, -1, parts)
    columns = _mean_of_finite(by_repeat, 1)
    same_samples = int(np.isfinite(columns).sum(1).max()) < 2
    if same_samples:
        columns = _mean_of_finite(by_repeat, 2)
    known = Stability(proxies=averaged, samples=count, same_samples=same_samples)
    over_all = _agreement(columns, np.zeros(count, np.int64), seed)
    within = _agreement(columns, label, seed)
    figures = within if within_classes else over_all
    if figures is None:
        note = f"{count} samples are too few to compare proxies, or their scores are all equal"
        return replace(known, note=note)
    return replace(
        known,
        value=figures.value,
        interval=figures.interval,
        single=figures.single,
        within_classes=within_classes,
        over_all=over_all,
        within=within,
    )


def _agreement(columns: np.ndarray, group: np.ndarray, seed: int) -> Agreement | None:
    """Compare columns of scores, float [n, columns], by ranks within groups, int [n].

    None if there are too few samples, or no differences.
    """
    averaged = int(np.isfinite(columns).sum(1).max())
    half = averaged // 2
    halves = _compare(columns, group, _splits(columns.shape[1], half, seed))
    singles = halves if half == 1 else _compare(columns, group, _splits(columns.shape[1], 1, seed))
    if not halves or not singles:
        return None
    resampled = [
        np.mean([pair.resampled(weight) for pair in halves], axis=0)
        for weight in resample_weights(np.ones(len(columns)), seed)
    ]
    interval = bootstrap_interval(np.concatenate(resampled))
    step = averaged / half
    return Agreement(
        value=_stepped_up(float(np.mean([pair.value for pair in halves])), step),
        interval=interval and (_stepped_up(interval[0], step), _stepped_up(interval[1], step)),
        single=float(np.mean([pair.value for pair in singles])),
    )


@dataclass(frozen=True)
class _Halves:
    """Ranks of the mean scores of two halves, for the samples at `rows` that both scored."""

    rows: np.ndarray
    ranks: RanksWithinClasses
    value: float

    def resampled(self, weight: np.ndarray) -> np.ndarray:
        """Return the correlation in each resample of all samples, float64 [resamples]."""
        return self.ranks.spearman(weight[:, self.rows])


Split = tuple[tuple[int, ...], tuple[int, ...]]
"""Two disjoint sets of as many columns."""


def _compare(columns: np.ndarray, group: np.ndarray, splits: list[Split]) -> list[_Halves]:
    """Return the splits whose halves can be compared."""
    result = []
    for first, second in splits:
        rows = np.flatnonzero(np.isfinite(columns[:, [*first, *second]]).all(1))
        if len(rows) < MIN_SAMPLES:
            continue
        one, other = (columns[rows][:, half].mean(1) for half in (first, second))
        ranks = RanksWithinClasses(one, other, group[rows], np.ones(len(rows)))
        value = float(ranks.spearman(np.ones((1, len(rows))))[0])
        if np.isfinite(value):
            result.append(_Halves(rows, ranks, value))
    return result


def _splits(columns: int, half: int, seed: int) -> list[Split]:
    """Return the splits of columns into two halves of a size; some if there are many."""
    count = math.comb(columns, half) * math.comb(columns - half, half) // 2
    if count <= MAX_SPLITS:
        return [
            (first, second)
            for first in itertools.combinations(range(columns), half)
            for second in itertools.combinations(sorted({*range(columns)} - {*first}), half)
            if first < second
        ]
    rng = np.random.default_rng([seed, columns, half])
    drawn: dict[Split, None] = {}
    while len(drawn) < MAX_SPLITS:
        order = rng.permutation(columns).tolist()
        halves = sorted((tuple(sorted(order[:half])), tuple(sorted(order[half : 2 * half]))))
        drawn[halves[0], halves[1]] = None
    return list(drawn)


def _mean_of_finite(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean over an axis without NaN; NaN where there is nothing else."""
    finite = np.isfinite(values)
    count = finite.sum(axis)
    total = np.where(finite, values, 0).sum(axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _stepped_up(correlation: float, count: float) -> float:
    """Return `spearman_brown` of correlations above 0; others stay: a mean cannot agree better."""
    return spearman_brown(correlation, count) if correlation > 0 else correlation


def _pair(interval: Any) -> BootstrapInterval | None:
    return (interval[0], interval[1]) if interval else None
