"""InfoMax: the sum of the scores less the redundancy of similar samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe.selection.base import SelectionOptions, SelectionPlan, one_group_quota
from raypipe.selection.blocks import (
    AllAlike,
    Block,
    BlockLayout,
    ByPosition,
    values_by_block,
    values_of_order,
)
from raypipe.selection.hard_cutoff import Excluding, hardest_samples
from raypipe.selection.neighbour_graph import cosine_graph
from raypipe.selection.quotas import class_quotas
from raypipe.selection.radix_select import Boundary, ValidatedStream

if TYPE_CHECKING:
    from scipy.sparse import csr_array

NEIGHBOURS = 10
STEPS = 300
"""Of projected gradient ascent."""
NORM_STEPS = 100
"""Of the power iteration for the norm of the kernel."""
ROOT_STEPS, ROUNDING = 100, 1e-12
"""Of the projection: steps at most, and the relative error of the sum that is accepted."""


def infomax(
    stream: ValidatedStream, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """InfoMax (Tan et al., ICLR 2025, arXiv 2506.01701), relaxed from {0, 1} to [0, 1].

        maximise s'x - a x'Kx over x in [0, 1]^n with sum x = k
        K = cosine similarity of the 10 nearest neighbours, symmetric, without negative values
        a = mean(s) / (rho mean row sum of K), rho = k / n

    by 300 steps of projected gradient ascent of length 1 / (2 a ||K||) from x = rho. The k largest
    x are kept. At x = rho both terms are equal with this a. The authors' code was not available:
    the objective is that of the paper; a, the neighbours and the solver are those of the
    implementation in OmniSelect-Benchmark.

    Deviations: the hardest samples are dropped first (`hard_cutoff`; 0 is the published method).
    s is the score scaled to [0, 1] in the block, and neighbours are those of the same block
    (`raypipe.selection.blocks`). Equal x are ordered by the gradient, then by the hash of the id.
    Not nested, since x depends on k.
    """
    cuts = hardest_samples(stream, keep, classes, options)
    lists = len(keep) // len(cuts)
    layout = BlockLayout.of(stream, classes, options, within_parts=True)
    shares = [
        _kept_shares(round(fraction * stream.samples), cuts[number // lists], options)
        for number, fraction in enumerate(keep)
    ]

    def values_of(block: Block, number: int) -> list[np.ndarray]:
        graph = cosine_graph(block.vectors, NEIGHBOURS)
        chosen = shares[lists * number : lists * (number + 1)]
        return [_values(block.score, graph, float(share[block.group])) for share in chosen]

    left = [Excluding(AllAlike(), cut) for cut in cuts]
    values = values_by_block(stream, layout, left, values_of, lists)
    return [
        SelectionPlan(Excluding(ByPosition(value), cuts[number // lists]), one_group_quota)
        for number, value in enumerate(values)
    ]


def _kept_shares(total: int, cut: Boundary, options: SelectionOptions) -> np.ndarray:
    """Return the share of the samples not cut off that each group keeps, float64 [G]."""
    left = cut.size - cut.quota
    if len(left) == 1:
        quotas = np.array([total])
    else:
        quotas = class_quotas(left, total, options.quotas, options.recall)
    return np.minimum(quotas / np.maximum(left, 1), 1.0)


def _values(score: np.ndarray, graph: csr_array, share: float) -> np.ndarray:
    """Return values that sort the samples of a block, highest x first."""
    s = score.astype(np.float64)
    s = (s - s.min()) / np.ptp(s) if np.ptp(s) > 0 else np.ones(len(s))
    kept = min(len(s), max(1, round(share * len(s))))
    x, gradient = relaxed_choice(s, graph, kept)
    return values_of_order(np.lexsort((-gradient, -x)))


def relaxed_choice(s: np.ndarray, graph: csr_array, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Solve the relaxed problem.

    Parameters
    ----------
    s : np.ndarray
        Scores, float64 [n], at least 0.
    graph : csr_array
        K, [n, n].
    kept : int
        k.

    Returns
    -------
    x, gradient : np.ndarray
        The solution and the gradient of the objective there, float64 [n] each.
    """
    x = np.full(len(s), kept / len(s))
    redundancy = x[0] * float(graph.sum()) / len(s)
    if not redundancy > 0:
        return x, s
    a = float(s.mean()) / redundancy
    norm, shift = _norm(graph), None
    for _ in range(STEPS):
        x, shift = project(x + (s - 2 * a * (graph @ x)) / (2 * a * norm), kept, shift)
    return x, s - 2 * a * (graph @ x)


def _norm(graph: csr_array) -> float:
    """Return the largest eigenvalue of a symmetric matrix without negative values."""
    vector, norm = np.ones(graph.shape[0]), 0.0
    for _ in range(NORM_STEPS):
        vector = graph @ (vector / np.linalg.norm(vector))
        norm = float(np.linalg.norm(vector))
    return norm


def project(y: np.ndarray, total: float, start: float | None = None) -> tuple[np.ndarray, float]:
    """Return the nearest point of [0, 1]^n with the given sum, float64 [n], and its shift t.

    It is y - t, clipped to [0, 1]. Newton's method finds t from `start`, or bisection where a step
    would leave the interval that t must be in. The t of the step before is close: from there, a
    projection takes 2 iterations instead of 8.
    """
    low, high = float(y.min()) - 1, float(y.max())
    t = start if start is not None and low < start < high else (low + high) / 2
    for _ in range(ROOT_STEPS):
        x = np.clip(y - t, 0, 1)
        excess = float(x.sum()) - total
        if abs(excess) <= ROUNDING * total:
            break
        low, high = (t, high) if excess > 0 else (low, t)
        moving = int(((x > 0) & (x < 1)).sum())
        t = t + excess / moving if moving else low
        if not low < t < high:
            t = (low + high) / 2
    return np.clip(y - t, 0, 1), t
