"""How many samples each group gets, in whole numbers that sum to what is asked for."""

from __future__ import annotations

import numpy as np


def in_proportion(counts: np.ndarray, total: int) -> np.ndarray:
    """The same share of each group, by largest remainder (Hamilton's method), in whole numbers throughout.

    Equal remainders go to the smaller group, then to the lower index. Returns int64 [G] with sum `total`.
    """
    everything = int(counts.sum())
    if everything == 0:
        return np.zeros(len(counts), np.int64)
    exact = [divmod(total * int(count), everything) for count in counts]
    quotas = np.array([whole for whole, _ in exact], np.int64)
    order = sorted(
        range(len(counts)), key=lambda group: (-exact[group][1], int(counts[group]), group)
    )
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas


def water_filled(counts: np.ndarray, total: int) -> np.ndarray:
    """The same number for each group, as far as it has so many: CCS's division of a budget (Zheng et al. 2023, algorithm 1).

    Groups are served from the smallest (equal ones by index): each gets the whole part of what is left divided by the groups left,
    or all it has. Returns int64 [G], with sum `total` where the groups hold so many; growing with `total` in every group.
    """
    quotas, left = np.zeros(len(counts), np.int64), total
    for served, group in enumerate(np.argsort(counts, kind="stable").tolist()):
        quotas[group] = min(int(counts[group]), left // (len(counts) - served))
        left -= int(quotas[group])
    return quotas


def bounded(quotas: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Quotas brought between `least` and `most` [G], with the sum `total`, which must lie between theirs.

    What is too much is taken from the groups in proportion to what they have above `least`; what is missing is given in proportion
    to what they have left below `most`.
    """
    result = np.clip(quotas, least, most)
    excess = int(result.sum()) - total
    if excess > 0:
        result = result - in_proportion(result - least, excess)
    elif excess < 0:
        result = result + in_proportion(most - result, -excess)
    return result
