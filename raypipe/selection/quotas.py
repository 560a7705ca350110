"""How many samples each group gets, in whole numbers with a given sum."""

from __future__ import annotations

from collections.abc import Sequence

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


def recall_quotas(counts: np.ndarray, total: int, recall: np.ndarray) -> np.ndarray:
    """Return more of the groups that are recognised less, int64 [G].

    DRoP (Vysogorets et al., ICLR 2025, arXiv 2404.05579): the share kept of a class is
    proportional to 1 - recall, at most 1, and what is above 1 is given to the other classes.
    The whole numbers are those of the largest remainder. Of equal remainders, the lower index comes
    first. The sum is `total` if the groups have that many samples.

    Parameters
    ----------
    counts : np.ndarray
        Samples per group, int64 [G].
    total : int
        Samples to keep.
    recall : np.ndarray
        Recall of each group, float64 [G]; NaN where it is unknown: such a group has the mean error
        of the others.
    """
    total = min(total, int(counts.sum()))
    error = 1 - recall
    known = np.isfinite(error)
    error[~known] = error[known].mean() if known.any() else 1.0
    exact, open_groups, left = np.zeros(len(counts)), counts > 0, float(total)
    while open_groups.any():
        weight = np.where(open_groups, error * counts, 0.0)
        if not weight.any():
            weight = np.where(open_groups, counts, 0).astype(np.float64)
        share = left * weight / weight.sum()
        full = open_groups & (share >= counts)
        if not full.any():
            exact[open_groups] = share[open_groups]
            break
        exact[full] = counts[full]
        left, open_groups = left - float(counts[full].sum()), open_groups & ~full
    quotas = np.minimum(np.floor(exact + 1e-9).astype(np.int64), counts)
    order = np.argsort(quotas - exact, kind="stable")
    order = order[quotas[order] < counts[order]]
    quotas[order[: total - int(quotas.sum())]] += 1
    return quotas


def class_quotas(
    counts: np.ndarray, total: int, rule: str = "proportional", recall: Sequence[float] = ()
) -> np.ndarray:
    """Return how many samples each class gets, int64 [classes + 1]; the last are the unlabelled.

    Parameters
    ----------
    counts : np.ndarray
        Samples per class, int64 [classes + 1].
    total : int
        Samples to keep.
    rule : {"proportional", "equal", "recall"}
        `proportional_quotas`, `even_quotas` or `recall_quotas`.
    recall : Sequence[float]
        Recall of each class, for "recall"; NaN where it is unknown.
    """
    if rule == "equal":
        return even_quotas(counts, total)
    if rule == "recall":
        return recall_quotas(counts, total, np.array([*recall, np.nan], np.float64))
    return proportional_quotas(counts, total)


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
