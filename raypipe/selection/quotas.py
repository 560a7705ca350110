"""How many samples each group gets, in whole numbers with a given sum."""

from __future__ import annotations

import numpy as np


def proportional_quotas(counts: np.ndarray, total: int) -> np.ndarray:
    """Return the same share of each group, int64 [G] with sum `total`.

    The method is the largest remainder (Hamilton's method), in whole numbers throughout. Of equal
    remainders, the smaller group comes first, then the lower index.
    """
    population = int(counts.sum())
    if population == 0:
        return np.zeros(len(counts), np.int64)
    exact = [divmod(total * int(count), population) for count in counts]
    quotas = np.array([whole for whole, _ in exact], np.int64)
    order = sorted(
        range(len(counts)), key=lambda group: (-exact[group][1], int(counts[group]), group)
    )
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas


def even_quotas(counts: np.ndarray, total: int) -> np.ndarray:
    """Return the same number for each group, or all it has, int64 [G].

    This is the budget allocation of CCS (Zheng et al. 2023, algorithm 1). Groups are served from
    the smallest (equal ones by index): each gets the whole part of the remaining budget divided
    by the remaining groups, or all it has. The sum is `total` if the groups have that many
    samples. No quota falls when `total` grows.
    """
    quotas, left = np.zeros(len(counts), np.int64), total
    for served, group in enumerate(np.argsort(counts, kind="stable").tolist()):
        quotas[group] = min(int(counts[group]), left // (len(counts) - served))
        left -= int(quotas[group])
    return quotas


def bounded_quotas(
    quotas: np.ndarray, minimum: np.ndarray, maximum: np.ndarray, total: int
) -> np.ndarray:
    """Return the quotas, moved between `minimum` and `maximum` [G] and to the sum `total`.

    `total` must lie between the sums of the bounds. An excess is taken from the groups in
    proportion to what they have above `minimum`. A deficit is given in proportion to the room
    below `maximum`.
    """
    result = np.clip(quotas, minimum, maximum)
    excess = int(result.sum()) - total
    if excess > 0:
        result = result - proportional_quotas(result - minimum, excess)
    elif excess < 0:
        result = result + proportional_quotas(maximum - result, -excess)
    return result
