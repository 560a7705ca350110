"""Strategies that go by the order of the scores alone: nothing is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raypipe.selection.base import (
    Options,
    SelectionPlan,
    Top,
    apart,
    everything,
    grouped,
    loss_of,
)
from raypipe.selection.radix_select import (
    Boundary,
    Chunk,
    Chunks,
    Ranking,
    boundaries,
    class_groups,
    key_value,
    order_key,
)
from raypipe.selection.statistics import ExactMoments


def top(
    chunks: Chunks, keep: Sequence[float], classes: int, options: Options
) -> list[SelectionPlan]:
    """The highest scores of all. Ties at the edge go by a hash of the sample_id, in every strategy.

    Of Score Extrapolation (Schmidt et al. 2025, arXiv 2506.09010), TDDS, Dynamic Uncertainty, EL2N and others. Nested.
    """
    return [SelectionPlan(Top(), everything)] * len(keep)


def balanced(
    chunks: Chunks, keep: Sequence[float], classes: int, options: Options
) -> list[SelectionPlan]:
    """The highest scores of each class; the same share of every class, and of the unlabelled as one more.

    MoSo (Tan et al. 2023, arXiv 2310.14664) keeps as many of each class, floor(size / C). Shares are kept here, by largest
    remainder, so that classes may differ in size and the sum is exact; and samples of other classes are out of the question, where the
    published code sets their scores to 0, which are then above negative ones. Nearly nested: a quota can fall by one
    where the keep fraction rises (the Alabama paradox of largest remainders).
    """
    return [apart(plan, classes) for plan in top(chunks, keep, classes, options)]


class Normalized(Ranking):
    """By the score's distance from the mean of its class, in standard deviations, rounded to float32; one group."""

    def __init__(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        self._mean, self._scale = mean, np.where(deviation > 0, deviation, 1.0)
        self._classes = len(mean) - 1

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        label = class_groups(chunk.label, self._classes)
        z = (chunk.score.astype(np.float64) - self._mean[label]) / self._scale[label]
        return order_key(z.astype(np.float32)), np.zeros(len(z), np.int64)


def normalized(
    chunks: Chunks, keep: Sequence[float], classes: int, options: Options
) -> list[SelectionPlan]:
    """The highest z-scores within the class: (s - mean_c) / std_c, then the highest of all.

    `nopt` of MoSo's published code. Mean and deviation (ddof 0) are exact sums, rounded once, of the samples that may be kept; the
    unlabelled are a class of their own. A class of equal scores has z = 0. Classes get shares that follow the shape of
    their scores and not their level. Nested.
    """
    moments = ExactMoments(classes + 1)
    for chunk in chunks(False):
        there = chunk.eligible()
        moments.add(chunk.score[there], class_groups(chunk.label, classes)[there])
    ranking = Normalized(*moments.mean_and_deviation())
    return [SelectionPlan(ranking, everything)] * len(keep)


class TwoEnds(Ranking):
    """Group 0: samples below a boundary of a ranking by value, group 1: those above it.

    outwards  True: the highest first above and the lowest first below; False: those nearest to the boundary first
    """

    groups = 2

    def __init__(self, boundary: Boundary, outwards: bool, by: str = "score") -> None:
        self._boundary, self._outwards, self._by = boundary, outwards, by
        self.needs_ids = boundary.needs_ids

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        value = loss_of(chunk) if self._by == "loss" else chunk.score
        above = self._boundary.mask(chunk)
        return order_key(np.where(above == self._outwards, value, -value)), above.astype(np.int64)


class Nearness(Ranking):
    """By the distance of the score from the edge of a boundary of its own group, the nearest first; one group."""

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self._value = np.where(
            np.append(boundary.quota, 0) > 0, key_value(boundary.threshold).astype(np.float64), 0.0
        )

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        _, group = self._boundary.ranking.place(chunk)
        distance = np.abs(chunk.score.astype(np.float64) - self._value[group])
        return order_key(-distance.astype(np.float32)), np.zeros(len(distance), np.int64)


def moderate(
    chunks: Chunks, keep: Sequence[float], classes: int, options: Options
) -> list[SelectionPlan]:
    """The scores around the median: of n samples in ascending order those from rank floor((n - k) / 2) on, k of them.

    Moderate coreset (Xia et al., ICLR 2023). Published with the distance of a sample to the centre of its class as the score;
    here it is whatever score was extrapolated, which the paper's argument (the median stands for the distribution) allows
    for. The published code keeps the ranks round(n (0.5 - keep/2)) to round(n (0.5 + keep/2)), which can be one sample more
    or fewer. The median is over all classes, as there. Nested.
    """
    (boundary,) = boundaries(
        chunks, [(grouped(Top(), classes, options), lambda size, _: size - size // 2)]
    )

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        below = max(0, int(size[0]) - (int(size.sum()) - total) // 2)
        return np.array([below, total - below], np.int64)

    return [SelectionPlan(TwoEnds(boundary, outwards=False), quotas, Nearness(boundary))] * len(
        keep
    )


def mixed(
    chunks: Chunks, keep: Sequence[float], classes: int, options: Options
) -> list[SelectionPlan]:
    """A share `easy_fraction` of the list from the easy end, the rest from the hard end: the extremes, and not the middle.

    Of k samples floor(easy_fraction k + 0.5) are those of lowest difficulty and the others those of highest; difficulty is the
    score, or the proxy's loss. Sorscher et al. 2022 (arXiv 2206.14486) show that hard samples are worth keeping where data
    are many and easy ones where they are few; they keep one end, which is easy_fraction 0 or 1. The mixture is ours. Nested.
    """
    share = options.easy_fraction

    def easy(total: int) -> int:
        return math.floor(share * total + 0.5)

    # for every keep fraction the easy samples lie below this boundary and the hard ones above
    by = options.difficulty
    hardest = grouped(Top(by), classes, options)
    (boundary,) = boundaries(
        chunks, [(hardest, lambda size, _: size - np.array([easy(int(count)) for count in size]))]
    )

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        return np.array([easy(total), total - easy(total)], np.int64)

    return [SelectionPlan(TwoEnds(boundary, outwards=True, by=by), quotas, Top())] * len(keep)
