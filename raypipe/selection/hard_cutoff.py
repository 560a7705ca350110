"""The hardest samples, which several strategies leave out before they choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.selection.base import ByScore, SelectionOptions, grouped_by_class
from raypipe.selection.radix_select import (
    Boundary,
    Chunk,
    Quotas,
    Ranking,
    ValidatedStream,
    find_boundaries,
)


def hardest_samples(
    stream: ValidatedStream, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[Boundary]:
    """Return which samples are cut off as the hardest, for each keep fraction.

    They are the share `options.hard_cutoff` of the eligible samples, rounded down, of each class
    with `options.by_class`. If the share is "auto", it is half of what is pruned.

    Returns
    -------
    list[Boundary]
        All of one ranking; one boundary if the share is the same for all fractions.
    """
    hardest = grouped_by_class(ByScore(options.difficulty), classes, options)
    fractions = keep if options.hard_cutoff == "auto" else keep[:1]
    return find_boundaries(
        stream,
        [(hardest, _cut_off(stream, fraction, options.hard_cutoff)) for fraction in fractions],
    )


def _cut_off(stream: ValidatedStream, fraction: float, share: float | str) -> Quotas:
    """Return quotas that say how many samples of each group are cut off."""

    def quotas(size: np.ndarray, _: np.ndarray) -> np.ndarray:
        eligible, kept = int(size.sum()), round(fraction * stream.samples)
        cut = max(0.0, 0.5 * (1 - kept / max(eligible, 1))) if share == "auto" else float(share)
        return (cut * size).astype(np.int64)

    return quotas


class Excluding(Ranking):
    """Another ranking, without the samples above a boundary."""

    def __init__(self, inner: Ranking, cut: Boundary) -> None:
        self._inner, self._cut, self.groups = inner, cut, inner.groups
        self.needs_ids = inner.needs_ids or cut.needs_ids

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, group = self._inner.rank(chunk)
        return key, np.where(self._cut.mask(chunk), -1, group)
