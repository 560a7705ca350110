"""Whether a keep-list favours samples of the seed set.

The seed set is a random draw. So a keep-list should hold the same share of it as of the rest,
unless scores mean something else for samples that were trained on or measured. A list of m out of N
samples, drawn whatever the membership, holds a hypergeometric number of the S seed samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.99
"""Two-sided coverage of what chance allows."""


@dataclass(frozen=True)
class SetShare:
    """How many samples of one set a list holds.

    Attributes
    ----------
    samples, kept : int
        Samples of the set, and those of them in the list.
    low, high : float
        Numbers that chance allows in the share `level` of lists of this size.
    """

    samples: int
    kept: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Share of the set that the list holds."""
        return self.kept / self.samples if self.samples else 0.0

    @property
    def within_chance(self) -> bool:
        """Whether the list holds as many as chance allows."""
        return self.low <= self.kept <= self.high


def set_shares(
    samples: Mapping[str, int], kept: Mapping[str, int], level: float = LEVEL
) -> dict[str, SetShare]:
    """Compare the shares of disjoint sets that a list holds.

    Parameters
    ----------
    samples
        Samples of each set; together they are all samples.
    kept
        Samples of each set in the list.
    level
        Two-sided coverage of what chance allows.
    """
    total, size = sum(samples.values()), sum(kept.values())
    result = {}
    for name, count in samples.items():
        low, high = _chance_interval(total, count, size, level) if total else (0, 0)
        result[name] = SetShare(count, kept[name], float(low), float(high))
    return result


def _chance_interval(total: int, members: int, drawn: int, level: float) -> tuple[int, int]:
    """Return the quantiles (1 - level) / 2 and (1 + level) / 2 of a hypergeometric number.

    As `scipy.stats.hypergeom(total, members, drawn).interval(level)`, whose import takes longer
    than all other work of a report. The probabilities follow from the ratios of neighbouring ones,
    within 12 standard deviations of the mean; those beyond are below 1e-30.
    """
    mean = drawn * members / total
    deviation = np.sqrt(mean * (1 - members / total) * (total - drawn) / max(1, total - 1))
    reach = 40 + 12 * deviation
    first = max(0, drawn + members - total, int(mean - reach))
    last = min(drawn, members, int(mean + reach))
    number = np.arange(first, last, dtype=np.float64)
    more = np.log(members - number) + np.log(drawn - number)
    fewer = np.log(number + 1) + np.log(total - members - drawn + number + 1)
    logarithm = np.concatenate([[0.0], np.cumsum(more - fewer)])
    cumulated = np.cumsum(np.exp(logarithm - logarithm.max()))
    tails = np.array([(1 - level) / 2, (1 + level) / 2]) * cumulated[-1]
    low, high = first + np.searchsorted(cumulated, tails)
    return int(low), int(high)
