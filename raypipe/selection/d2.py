"""D2 pruning: scores spread over a graph of neighbours, then a choice that avoids neighbours."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

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
from raypipe.selection.neighbour_graph import nearest_neighbours
from raypipe.selection.radix_select import ValidatedStream

NEIGHBOURS = 5
"""k."""
REVERSE_DECAY = 0.1
"""gamma of the reverse messages."""


def d2(
    stream: ValidatedStream, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """D2 pruning (Maharana et al., ICLR 2024, arXiv 2310.07931), by the formulas of its code.

        drop the hardest samples (`hard_cutoff`)
        u_i = s_i + sum over the 5 nearest j of exp(-d_ij) s_j             (forward messages)
        repeat: keep the sample i with the highest u
                u_j -= exp(-0.1 d_ij) u_i for the 5 nearest j of i          (reverse messages)

    s is the score and d the distance of the embeddings. The code is `GraphDensitySampler` in
    `core/data/sampling.py`, with a precomputed graph, `sum` and `weighted`.

    Deviations: distances are divided by the mean distance of neighbours in the block, so that the
    unit of the embeddings does not matter. If scores are negative, s is score - min score.
    Neighbours are those of the same block (`raypipe.selection.blocks`). Of equal u, the sample
    with the lower hash of the id comes first. Nested with a fixed cut-off.
    """
    cuts = hardest_samples(stream, keep, classes, options)
    layout = BlockLayout.of(stream, classes, options, within_parts=True)
    values = values_by_block(stream, layout, [Excluding(AllAlike(), cut) for cut in cuts], _values)
    plans = [
        SelectionPlan(Excluding(ByPosition(value), cut), one_group_quota)
        for value, cut in zip(values, cuts, strict=True)
    ]
    return plans if len(plans) == len(keep) else plans * len(keep)


def _values(block: Block, _: int) -> list[np.ndarray]:
    distance, row = nearest_neighbours(block.vectors, NEIGHBOURS)
    return [values_of_order(message_passing_order(block.score, distance, row))]


def message_passing_order(score: np.ndarray, distance: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return all n samples in the order in which they are kept, int64 [n].

    Parameters
    ----------
    score : np.ndarray
        float [n].
    distance, row : np.ndarray
        The nearest neighbours of each sample, [n, k] each.
    """
    n = len(score)
    scale = float(distance.mean()) if distance.size else 1.0
    scaled = distance / (scale if scale > 0 else 1.0)
    s = score.astype(np.float64)
    s -= min(0.0, float(s.min(initial=0.0)))
    u: list[float] = (s + (np.exp(-scaled) * s[row]).sum(axis=1)).tolist()
    neighbours, weight = row.tolist(), np.exp(-REVERSE_DECAY * scaled).tolist()

    # an entry that is no longer u is put back when it comes up: u has fallen since
    heap = [(-value, sample) for sample, value in enumerate(u)]
    heapq.heapify(heap)
    kept, order = bytearray(n), np.empty(n, np.int64)
    for place in range(n):
        while True:
            negative, sample = heap[0]
            if kept[sample]:
                heapq.heappop(heap)
            elif negative != -u[sample]:
                heapq.heapreplace(heap, (-u[sample], sample))
            else:
                break
        heapq.heappop(heap)
        kept[sample], order[place], message = 1, sample, u[sample]
        for other, share in zip(neighbours[sample], weight[sample], strict=True):
            u[other] -= share * message
            if message < 0 and not kept[other]:  # u has risen
                heapq.heappush(heap, (-u[other], other))
    return order
