"""Strata of equal width of the score, as in CCS (Zheng et al., ICLR 2023, arXiv 2210.15809)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raypipe.selection.radix_select import Boundary, Chunk, Chunks, Ranking


class Strata(Ranking):
    """Another order within strata of equal width of the score.

    Samples above a boundary are excluded.

    Parameters
    ----------
    order : Ranking
        The order within a stratum.
    cut : Boundary
        The samples to exclude.
    low, width : np.ndarray
        Lowest score and width of a stratum for each group of the boundary, float64 [G].
    strata : int
        Number of strata.
    """

    def __init__(
        self, order: Ranking, cut: Boundary, low: np.ndarray, width: np.ndarray, strata: int
    ) -> None:
        self._order, self._cut, self.groups = order, cut, strata
        self.needs_ids = order.needs_ids or cut.needs_ids
        self._low, self._width = low, np.where(width > 0, width, 1.0)

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, _ = self._order.rank(chunk)
        stratum = self.stratum(chunk)
        return key, np.where(self._cut.mask(chunk), -1, stratum)

    def ordered_by(self, order: Ranking) -> Strata:
        """Return the same strata with another order within them."""
        return Strata(order, self._cut, self._low, self._width, self.groups)

    def stratum(self, chunk: Chunk) -> np.ndarray:
        """Return the stratum of each sample, excluded ones included, int64 [n]."""
        _, part = self._cut.ranking.rank(chunk)
        # one more entry for group -1, which is excluded
        low, width = np.append(self._low, 0.0)[part], np.append(self._width, 1.0)[part]
        place = (chunk.score.astype(np.float64) - low) / width
        return np.clip(np.floor(place), 0, self.groups - 1).astype(np.int64)


def score_strata(
    chunks: Chunks, order: Ranking, cuts: Sequence[Boundary], strata: int
) -> list[Strata]:
    """Return strata of the scores that each of some boundaries of one ranking does not cut off."""
    ranking = cuts[0].ranking
    low, high = (np.full((len(cuts), ranking.groups), edge) for edge in (math.inf, -math.inf))
    for chunk in chunks(any(cut.needs_ids for cut in cuts)):
        eligible = chunk.eligible()
        _, group = ranking.rank(chunk)
        for row, cut in enumerate(cuts):
            left = eligible & ~cut.mask(chunk)
            score = chunk.score[left]
            if ranking.groups == 1:
                low[row] = score.min(initial=low[row, 0])
                high[row] = score.max(initial=high[row, 0])
            else:
                np.minimum.at(low[row], group[left], score)
                np.maximum.at(high[row], group[left], score)
    empty = low > high
    low[empty] = high[empty] = 0.0
    return [
        Strata(order, cut, lowest, (highest - lowest) / strata, strata)
        for cut, lowest, highest in zip(cuts, low, high, strict=True)
    ]
