"""What a keep-list strategy is, and what all of them are built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from raypipe.errors import ConfigError
from raypipe.selection.quotas import in_proportion
from raypipe.selection.radix_select import (
    ALWAYS,
    FIRST,
    Boundary,
    Checked,
    Chunk,
    Ranking,
    class_groups,
    order_key,
)


@dataclass(frozen=True)
class Options:
    """The numbers strategies go by; `raypipe.config.SelectSettings` says what each is and validates them."""

    seed: int = 0
    easy_fraction: float = 0.5
    hard_cutoff: float | Literal["auto"] = "auto"
    strata: int = 50
    beta_exponent: float = 4.0
    difficulty: str = "score"
    by_class: bool = False
    min_per_class: int = 0
    weights: str = "none"


@dataclass(frozen=True, eq=False)
class SelectionPlan:
    """How one keep-list is made.

    ranking    the order within each group
    quotas     (samples per group [G], samples to keep) -> samples to keep per group [G], which sum to the latter
    priority   the order within a class in which `min_per_class` reserves samples; None: that of the ranking
    inclusion  (chunk, boundary) -> probability float64 [n] with which each sample is drawn; None: nothing is drawn
    """

    ranking: Ranking
    quotas: Callable[[np.ndarray, int], np.ndarray]
    priority: Ranking | None = None
    inclusion: Callable[[Chunk, Boundary], np.ndarray] | None = None


@dataclass(frozen=True)
class Strategy:
    """A way to choose a keep-list; one of `raypipe.selection.STRATEGIES`.

    plan        (stream, keep fractions, number of classes, options) -> a plan for each fraction; may read the stream
    nested      whether the list of a smaller keep fraction lies inside that of a larger one
    draws       whether it draws at random, so that inclusion probabilities say something
    classes     whether it looks at the class
    by_class    whether every class has the same share of its lists anyway
    loss        whether it always needs the proxy's loss
    difficulty  whether it goes by difficulty, and so needs the proxy's loss where `Options.difficulty` is loss
    scores      whether it goes by the scores, so that their fidelity matters
    """

    plan: Callable[[Checked, Sequence[float], int, Options], list[SelectionPlan]]
    nested: bool = True
    draws: bool = False
    classes: bool = False
    by_class: bool = False
    loss: bool = False
    difficulty: bool = False
    scores: bool = True


def everything(counts: np.ndarray, total: int) -> np.ndarray:
    """Quotas where all samples are one group."""
    return np.full(1, total, np.int64)


def loss_of(chunk: Chunk) -> np.ndarray:
    """The proxy's loss, float32 [n]. Raises ConfigError where the stream has none."""
    if chunk.loss is None:
        raise ConfigError(
            "this strategy needs the proxy's loss of each sample, and the stream has none"
        )
    return chunk.loss


class Top(Ranking):
    """By score, all samples in one group; or by the proxy's loss."""

    def __init__(self, by: str = "score") -> None:
        self._by = by

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        value = loss_of(chunk) if self._by == "loss" else chunk.score
        return order_key(value), np.zeros(len(value), np.int64)


class ByClass(Ranking):
    """Another ranking's keys, or those of `order`, with the classes as groups and the unlabelled as one more.

    Samples that are out of the question in the other ranking are so here, but for those marked ALWAYS, which come first.
    """

    def __init__(self, inner: Ranking, classes: int, order: Ranking | None = None) -> None:
        self._inner, self._classes, self._order = inner, classes, order or inner
        self.groups, self.needs_ids = classes + 1, inner.needs_ids or self._order.needs_ids

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, (_, group) = self._order.place(chunk)[0], self._inner.place(chunk)
        always = always_kept(chunk)
        label = class_groups(chunk.label, self._classes)
        return np.where(always, FIRST, key), np.where((group < 0) & ~always, -1, label)


class Apart(Ranking):
    """Another ranking with the groups of each class apart, the unlabelled as one more class: group = class * groups + group."""

    def __init__(self, inner: Ranking, classes: int) -> None:
        self._inner, self._classes = inner, classes
        self.groups, self.needs_ids = (classes + 1) * inner.groups, inner.needs_ids

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, group = self._inner.place(chunk)
        label = class_groups(chunk.label, self._classes)
        return key, np.where(group < 0, -1, label * self._inner.groups + group)


def apart(plan: SelectionPlan, classes: int) -> SelectionPlan:
    """A plan in which every class has the same share of the list, as near as whole numbers come, divided within it as before."""

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        of_class = size.reshape(classes + 1, -1)
        totals = in_proportion(of_class.sum(axis=1), total).tolist()
        return np.concatenate(
            [plan.quotas(sizes, share) for sizes, share in zip(of_class, totals, strict=True)]
        )

    return replace(plan, ranking=Apart(plan.ranking, classes), quotas=quotas)


def grouped(ranking: Ranking, classes: int, options: Options) -> Ranking:
    """A ranking of one group as it is, or with a group for every class where `options.by_class`."""
    return Apart(ranking, classes) if options.by_class else ranking


class Reserving(Ranking):
    """Another ranking in which reserved samples come first in their group: those marked ALWAYS, and the first of each class.

    One more group, the last, has the reserved samples that are out of the question there.
    """

    def __init__(self, inner: Ranking, of_class: Boundary | None) -> None:
        self._inner, self._of_class = inner, of_class
        self.groups = inner.groups + 1
        self.needs_ids = inner.needs_ids or (of_class is not None and of_class.needs_ids)

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, group = self._inner.place(chunk)
        first = always_kept(chunk)
        if self._of_class is not None:
            first = first | self._of_class.mask(chunk)
        return np.where(first, FIRST, key), np.where(first & (group < 0), self.groups - 1, group)


def always_kept(chunk: Chunk) -> np.ndarray:
    """bool [n]: samples marked ALWAYS."""
    return np.zeros(len(chunk.score), bool) if chunk.mark is None else chunk.mark == ALWAYS
