"""Coverage: within each stratum of the score, the samples that represent the others best."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe.selection.base import SelectionOptions, SelectionPlan
from raypipe.selection.blocks import (
    AllAlike,
    Block,
    BlockLayout,
    ByPosition,
    values_by_block,
    values_of_order,
)
from raypipe.selection.hard_cutoff import hardest_samples
from raypipe.selection.neighbour_graph import cosine_graph
from raypipe.selection.quotas import even_quotas
from raypipe.selection.radix_select import ValidatedStream
from raypipe.selection.strata import score_strata

if TYPE_CHECKING:
    from scipy.sparse import csr_array

NEIGHBOURS = 20


def coverage(
    stream: ValidatedStream, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Plan to keep the best representatives of each stratum of the score.

    The hardest samples are dropped and the budget is divided among strata as by `ccs` (Zheng et
    al., ICLR 2023, arXiv 2210.15809, algorithm 1). Within a stratum, samples are not drawn at
    random. They maximise the facility-location function

        F(S) = sum over i of max over j in S of sim(i, j)

    greedily (Nemhauser et al. 1978: at least 1 - 1/e of the best F), with the lazy evaluation of
    Minoux 1978. sim is the cosine similarity of the 20 nearest neighbours of the same block
    (`raypipe.selection.blocks`), 1 for a sample and itself, and 0 for all other pairs. Wei et al.,
    ICML 2015, choose training data by this function; the sparse graph and the strata are ours. Of
    equal gains, the sample with the lower hash of the id comes first. Nested with a fixed cut-off.
    """
    cuts = hardest_samples(stream, keep, classes, options)
    strata = score_strata(stream, AllAlike(), cuts, options.strata)
    layout = BlockLayout.of(stream, classes, options)
    values = values_by_block(stream, layout, strata, _values)
    plans = [
        SelectionPlan(ranking.ordered_by(ByPosition(value)), even_quotas)
        for ranking, value in zip(strata, values, strict=True)
    ]
    return plans if len(plans) == len(keep) else plans * len(keep)


def _values(block: Block, _: int) -> list[np.ndarray]:
    return [values_of_order(facility_location_order(cosine_graph(block.vectors, NEIGHBOURS)))]


def facility_location_order(graph: csr_array) -> np.ndarray:
    """Return all n samples in the order in which the greedy algorithm takes them, int64 [n].

    Parameters
    ----------
    graph : csr_array
        Similarities of neighbours, [n, n], symmetric, in [0, 1]; the diagonal counts as 1.
    """
    n = graph.shape[0]
    starts, other, similarity = graph.indptr.tolist(), graph.indices, graph.data
    best = np.zeros(n)  # similarity of each sample to the nearest one taken
    first = 1 + np.asarray(graph.sum(axis=1)).reshape(-1)
    heap = [(-gain, sample) for sample, gain in enumerate(first.tolist())]
    heapq.heapify(heap)
    order = np.empty(n, np.int64)
    for place in range(n):
        while True:
            sample = heap[0][1]
            part = slice(starts[sample], starts[sample + 1])
            rows, near = other[part], similarity[part]
            gain = (1 - best[sample]) + float(np.maximum(near - best[rows], 0).sum())
            if gain >= -heap[0][0]:  # gains only fall, so no other sample has a higher one
                break
            heapq.heapreplace(heap, (-gain, sample))
        heapq.heappop(heap)
        order[place], best[sample] = sample, 1.0
        best[rows] = np.maximum(best[rows], near)
    return order
