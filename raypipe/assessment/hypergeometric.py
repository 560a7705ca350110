"""How many members of a set a random draw holds."""

from __future__ import annotations

import numpy as np


def hypergeometric_interval(total: int, members: int, drawn: int, level: float) -> tuple[int, int]:
    """Return the quantiles (1 - level) / 2 and (1 + level) / 2 of a hypergeometric number.

    As `scipy.stats.hypergeom(total, members, drawn).interval(level)`, without the import, which
    takes longer than all other work of a report. The probabilities follow from the ratios of
    neighbouring ones, within 12 standard deviations of the mean; those beyond are below 1e-30.

    Parameters
    ----------
    total
        Items of the population.
    members
        Those among them that are counted.
    drawn
        Items drawn without replacement.
    level
        Probability of the interval, 0 to 1.
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
