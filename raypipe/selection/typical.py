"""Typicality: the samples in the densest regions of the embedding space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.selection.base import SelectionOptions, SelectionPlan, one_group_quota
from raypipe.selection.blocks import AllAlike, Block, BlockLayout, ByPosition, values_by_block
from raypipe.selection.neighbour_graph import nearest_neighbours
from raypipe.selection.radix_select import ValidatedStream

NEIGHBOURS = 20


def typical(
    stream: ValidatedStream, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Plan to keep the samples nearest to their 20th nearest neighbour.

    TypiClust (Hacohen et al., ICML 2022, arXiv 2202.02794) calls the inverse of the mean distance
    to the 20 nearest neighbours the typicality of a sample, and labels the most typical sample of
    each cluster first. Here the distance to the 20th neighbour estimates the density (Loftsgaarden
    & Quesenberry 1965), and nothing is clustered. Scores are not used. Neighbours are those of the
    same block (`raypipe.selection.blocks`). With 20 samples or fewer, the farthest one counts.
    Nested.
    """
    layout = BlockLayout.of(stream, classes, options)
    (value,) = values_by_block(stream, layout, [AllAlike()], _values)
    return [SelectionPlan(ByPosition(value), one_group_quota)] * len(keep)


def _values(block: Block, _: int) -> list[np.ndarray]:
    distance, _row = nearest_neighbours(block.vectors, NEIGHBOURS)
    return [-distance[:, -1] if distance.size else np.zeros(len(distance))]
