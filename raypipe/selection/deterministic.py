"""Strategies without randomness: they depend on the order of the scores alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raypipe.selection.base import (
    ByScore,
    SelectionOptions,
    SelectionPlan,
    difficulty_of,
    grouped_by_class,
    one_group_quota,
    within_classes,
)
from raypipe.selection.radix_select import (
    Boundary,
    Chunk,
    Chunks,
    Ranking,
    class_groups,
    find_boundaries,
    key_value,
    order_key,
)
from raypipe.selection.statistics import ExactMoments


def top(
    chunks: Chunks, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Plan to keep the highest scores overall.

    Used by Score Extrapolation (Schmidt et al. 2025, arXiv 2506.09010), TDDS, Dynamic Uncertainty,
    EL2N and others. In every strategy a hash of the sample_id breaks ties at the edge. Nested.
    """
    return [SelectionPlan(ByScore(), one_group_quota)] * len(keep)


def balanced(
    chunks: Chunks, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Plan to keep the highest scores of each class, with the same share of every class.

    The unlabelled form one more class. MoSo (Tan et al. 2023, arXiv 2310.14664) keeps the same
    number of each class, floor(size / C). Here shares are kept, by largest remainder: classes can
    differ in size and the sum is exact. Samples of other classes are excluded; the published code
    sets their scores to 0, which ranks them above negative scores. Nearly nested: a quota can
    fall by one when the keep fraction rises (the Alabama paradox of largest remainders).
    """
    return [within_classes(plan, classes, options) for plan in top(chunks, keep, classes, options)]


class ByClassZScore(Ranking):
    """By the distance of the score from the mean of its class, in standard deviations; one group.

    The distance is rounded to float32.
    """

    def __init__(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        self._mean, self._scale = mean, np.where(deviation > 0, deviation, 1.0)
        self._classes = len(mean) - 1

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        label = class_groups(chunk.label, self._classes)
        z = (chunk.score.astype(np.float64) - self._mean[label]) / self._scale[label]
        return order_key(z.astype(np.float32)), np.zeros(len(z), np.int64)


def normalized(
    chunks: Chunks, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Plan to keep the highest z-scores, (s - mean_c) / std_c with the statistics of the class.

    This is `nopt` of MoSo's published code. Mean and deviation (ddof 0) are exact sums over the
    eligible samples, rounded once. The unlabelled form a class of their own. A class with equal
    scores has z = 0. The share of a class depends on the shape of its scores, not on their level.
    Nested.
    """
    moments = ExactMoments(classes + 1)
    for chunk in chunks(False):
        eligible = chunk.eligible()
        moments.add(chunk.score[eligible], class_groups(chunk.label, classes)[eligible])
    ranking = ByClassZScore(*moments.mean_and_deviation())
    return [SelectionPlan(ranking, one_group_quota)] * len(keep)


class TwoEnds(Ranking):
    """Group 0 has the samples below a boundary of a ranking by value, group 1 those above it.

    Parameters
    ----------
    boundary : Boundary
        Separates the two groups.
    outwards : bool
        True: highest first above, lowest first below. False: nearest to the boundary first.
    by : {"score", "loss", "aum"}
        The value; see `difficulty_of`.
    """

    groups = 2

    def __init__(self, boundary: Boundary, outwards: bool, by: str = "score") -> None:
        self._boundary, self._outwards, self._by = boundary, outwards, by
        self.needs_ids = boundary.needs_ids

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        value = difficulty_of(chunk, self._by)
        above = self._boundary.mask(chunk)
        return order_key(np.where(above == self._outwards, value, -value)), above.astype(np.int64)


class NearestFirst(Ranking):
    """By the distance of the score from the edge of a boundary of its own group; one group.

    The nearest come first.
    """

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self._value = np.where(
            np.append(boundary.quota, 0) > 0, key_value(boundary.threshold).astype(np.float64), 0.0
        )

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        _, group = self._boundary.ranking.rank(chunk)
        distance = np.abs(chunk.score.astype(np.float64) - self._value[group])
        return order_key(-distance.astype(np.float32)), np.zeros(len(distance), np.int64)


def moderate(
    chunks: Chunks, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Plan to keep the scores around the median.

    Of n samples in ascending order it keeps k, from rank floor((n - k) / 2) on. Moderate coreset
    (Xia et al., ICLR 2023) was published with the distance of a sample to the centre of its class
    as the score. Here it is whatever score was extrapolated; the paper's argument (the median
    represents the distribution) allows for this. The published code keeps the ranks round(n (0.5
    - keep/2)) to round(n (0.5 + keep/2)), which can be one sample more or fewer. The median is
    over all classes, as in the published code. Nested.
    """
    (boundary,) = find_boundaries(
        chunks, [(grouped_by_class(ByScore(), classes, options), lambda size, _: size - size // 2)]
    )

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        below = max(0, int(size[0]) - (int(size.sum()) - total) // 2)
        return np.array([below, total - below], np.int64)

    return [SelectionPlan(TwoEnds(boundary, outwards=False), quotas, NearestFirst(boundary))] * len(
        keep
    )


def mixed(
    chunks: Chunks, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Both extremes: a share `easy_fraction` of the list from the easy end, the rest hard samples.

    Of k samples, floor(easy_fraction k + 0.5) have the lowest difficulty and the others the
    highest. Difficulty is the score or the proxy's loss. Sorscher et al. 2022 (arXiv 2206.14486)
    show that hard samples are worth keeping where data is abundant, and easy ones where it is
    scarce. They keep one end, which is easy_fraction 0 or 1. The mixture is ours. Nested.
    """
    share = options.easy_fraction

    def easy(total: int) -> int:
        return math.floor(share * total + 0.5)

    # for every keep fraction, the easy samples are below this boundary and the hard ones above it
    by = options.difficulty
    hardest = grouped_by_class(ByScore(by), classes, options)
    (boundary,) = find_boundaries(
        chunks, [(hardest, lambda size, _: size - np.array([easy(int(count)) for count in size]))]
    )

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        return np.array([easy(total), total - easy(total)], np.int64)

    return [SelectionPlan(TwoEnds(boundary, outwards=True, by=by), quotas, ByScore())] * len(keep)
