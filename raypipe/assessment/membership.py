"""Whether a keep-list favours samples of the seed set.

The seed set is a random draw. So a keep-list should hold the same share of it as of the rest,
unless scores mean something else for samples that were trained on or measured. A list of m out of N
samples, drawn whatever the membership, holds a hypergeometric number of the S seed samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raypipe.assessment.hypergeometric import hypergeometric_interval

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
        low, high = hypergeometric_interval(total, count, size, level) if total else (0, 0)
        result[name] = SetShare(count, kept[name], float(low), float(high))
    return result
