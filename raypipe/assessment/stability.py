"""How well the scores would agree with those of another training of all proxies.

With cross-fitting (`raypipe.runs.cross_fit`), K proxies score each sample. They were trained on
disjoint parts of the seed set, from different weights. Two of them have no more in common than two
trainings on two seed sets. So the mean rank correlation r of two proxies shows how well one proxy
agrees with another training, and the Spearman-Brown formula how well the mean of K proxies does:

    stability = K r / (1 + (K - 1) r)

(Spearman 1910; Brown 1910). The formula assumes that all proxies are equally good.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raypipe.assessment.rank_agreement import MIN_SAMPLES, BootstrapInterval

RESAMPLES = 500
"""Bootstrap resamples."""
MAX_SAMPLES = 20_000
"""Samples that are compared of a larger set, the first ones: more would not narrow the interval
visibly."""


@dataclass(frozen=True)
class Stability:
    """Agreement of the scores with those of another training.

    Attributes
    ----------
    value : float or None
        Rank correlation to expect between the means over `proxies` proxies of two runs; None when
        it is unknown.
    interval : tuple of float or None
        Its 95 % bootstrap interval over samples.
    single : float or None
        Mean rank correlation of the scores of two proxies.
    proxies : int
        Proxies whose scores are averaged for a sample.
    samples : int
        Samples compared.
    within_classes : bool
        Whether ranks are those within the class of a sample.
    note : str
        Why the value is unknown; else empty.
    """

    value: float | None = None
    interval: BootstrapInterval | None = None
    single: float | None = None
    proxies: int = 1
    samples: int = 0
    within_classes: bool = False
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {**asdict(self), "interval": list(self.interval) if self.interval else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stability:
        """Restore what `as_dict` returned."""
        interval = data.get("interval")
        return cls(**{**data, "interval": (interval[0], interval[1]) if interval else None})


def spearman_brown(correlation: float, count: float) -> float:
    """Return the correlation of two means over `count` measurements, from that of single ones."""
    return count * correlation / (1 + (count - 1) * correlation)


def stability(
    by_proxy: np.ndarray, label: np.ndarray, seed: int, within_classes: bool = False
) -> Stability:
    """Compare the scores that several proxies gave the same samples.

    Parameters
    ----------
    by_proxy
        Scores, float [n, proxies]; NaN where a proxy was trained on the sample's part.
    label
        Classes, int [n].
    seed
        Seed of the bootstrap.
    within_classes
        Whether to compare ranks within classes, as keep-lists that are cut within classes do.

    Returns
    -------
    Stability
        Has a note instead of a value if there is nothing to compare.
    """
    by_proxy, label = by_proxy[:MAX_SAMPLES], label[:MAX_SAMPLES]
    count, proxies = by_proxy.shape
    averaged = int(np.isfinite(by_proxy).sum(1).max(initial=0))
    if proxies < 2 or averaged < 2:
        note = "each sample was scored by one proxy only"
        return Stability(proxies=1, samples=count, note=note)
    group = label if within_classes else np.zeros(count, np.int64)
    pairs = [
        ranks
        for first, second in itertools.combinations(range(proxies), 2)
        if (ranks := _ranks_of_pair(by_proxy[:, [first, second]], group)) is not None
    ]
    if not pairs:
        note = f"{count} samples are too few to compare proxies, or their scores are all equal"
        return Stability(proxies=averaged, samples=count, note=note)
    rng = np.random.default_rng(seed)
    single = float(np.mean([_correlation(ranks, np.ones(len(ranks))) for ranks in pairs]))
    resampled = np.zeros(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, count, count), minlength=count)
        resampled[number] = np.mean(
            [_correlation(ranks, drawn[ranks[:, 2].astype(np.int64)]) for ranks in pairs]
        )
    lower, upper = np.quantile(resampled, [0.025, 0.975])
    return Stability(
        value=_stepped_up(single, averaged),
        interval=(_stepped_up(float(lower), averaged), _stepped_up(float(upper), averaged)),
        single=single,
        proxies=averaged,
        samples=count,
        within_classes=within_classes,
    )


def _stepped_up(correlation: float, count: int) -> float:
    """Return `spearman_brown` of correlations above 0; others stay: a mean cannot agree better."""
    return spearman_brown(correlation, count) if correlation > 0 else correlation


def _ranks_of_pair(values: np.ndarray, group: np.ndarray) -> np.ndarray | None:
    """Return the centred ranks of two columns within groups, and the rows: float64 [m, 3].

    Ranks are scaled by the size of the group. None if there are too few rows or no differences.
    """
    from scipy.stats import rankdata

    rows = np.flatnonzero(np.isfinite(values).all(1))
    result = np.zeros((len(rows), 3))
    result[:, 2] = rows
    own = group[rows]
    for key in np.unique(own):
        members = np.flatnonzero(own == key)
        for column in range(2):
            ranks = rankdata(values[rows[members], column])
            result[members, column] = (ranks - (len(members) + 1) / 2) / len(members)
    if len(rows) < MIN_SAMPLES or not np.ptp(result[:, :2], axis=0).all():
        return None
    return result


def _correlation(ranks: np.ndarray, weight: np.ndarray) -> float:
    """Return the weighted correlation of the first two columns, which are centred."""
    a, b = ranks[:, 0], ranks[:, 1]
    spread = float(np.sqrt((weight @ (a * a)) * (weight @ (b * b))))
    return float(weight @ (a * b)) / spread if spread else 0.0
