"""The interface of keep-list strategies, and rankings and quotas that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from raypipe.errors import ConfigError
from raypipe.selection.quotas import class_quotas
from raypipe.selection.radix_select import (
    ALWAYS,
    RESERVED_KEY,
    Boundary,
    Chunk,
    Ranking,
    ValidatedStream,
    class_groups,
    order_key,
)


@dataclass(frozen=True)
class Parts:
    """Parts of the samples, with scores by different proxies (`raypipe.runs.proxy_roles`).

    Attributes
    ----------
    count : int
        Number of parts.
    of : callable
        ids [n] -> part of each sample, int64 [n].
    """

    count: int
    of: Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class SelectionOptions:
    """Parameters of the strategies; `raypipe.config.SelectSettings` describes and checks them.

    `recall` has the recall of each class for quotas "recall", NaN where it is unknown. `own` has
    the options of a strategy from outside. `parts` are those of the run, None without
    cross-fitting.
    """

    seed: int = 0
    easy_fraction: float = 0.5
    hard_cutoff: float | Literal["auto"] = "auto"
    strata: int = 50
    beta_exponent: float = 4.0
    difficulty: str = "score"
    by_class: bool = False
    quotas: str = "proportional"
    recall: tuple[float, ...] = ()
    min_per_class: int = 0
    weights: str = "none"
    own: Mapping[str, Any] = field(default_factory=dict)
    parts: Parts | None = None


@dataclass(frozen=True, eq=False)
class SelectionPlan:
    """How one keep-list is computed.

    Attributes
    ----------
    ranking : Ranking
        The order within each group.
    quotas : callable
        (samples per group [G], samples to keep) -> samples to keep per group [G], with that sum.
    priority : Ranking, optional
        The order within a class in which `min_per_class` reserves samples. None: that of the
        ranking.
    inclusion : callable, optional
        (chunk, boundary) -> probability with which each sample is drawn, float64 [n]. None:
        nothing is drawn.
    """

    ranking: Ranking
    quotas: Callable[[np.ndarray, int], np.ndarray]
    priority: Ranking | None = None
    inclusion: Callable[[Chunk, Boundary], np.ndarray] | None = None


@dataclass(frozen=True)
class Strategy:
    """A rule that chooses keep-lists; one entry of `raypipe.selection.STRATEGIES`.

    Attributes
    ----------
    plan : callable
        (stream, keep fractions, number of classes, options) -> one `SelectionPlan` per fraction.
        It may read the stream.
    nested : bool
        Whether the list of a smaller keep fraction is contained in that of a larger one.
    draws_at_random : bool
        Whether samples are drawn at random, so that inclusion probabilities are meaningful.
    uses_classes : bool
        Whether the strategy looks at the class labels.
    balances_classes : bool
        Whether every class keeps the same share even without `SelectionOptions.by_class`.
    needs_loss : bool
        Whether the strategy always needs the proxy's loss.
    uses_difficulty : bool
        Whether the strategy ranks by difficulty. It then needs the proxy's loss if
        `SelectionOptions.difficulty` is "loss".
    uses_scores : bool
        Whether the strategy uses the scores, so that their fidelity matters.
    needs_embeddings : bool
        Whether the strategy reads `ValidatedStream.embedded`.
    """

    plan: Callable[[ValidatedStream, Sequence[float], int, SelectionOptions], list[SelectionPlan]]
    nested: bool = True
    draws_at_random: bool = False
    uses_classes: bool = False
    balances_classes: bool = False
    needs_loss: bool = False
    uses_difficulty: bool = False
    uses_scores: bool = True
    needs_embeddings: bool = False


def one_group_quota(counts: np.ndarray, total: int) -> np.ndarray:
    """Quotas if all samples form one group."""
    return np.full(1, total, np.int64)


def required_loss(chunk: Chunk) -> np.ndarray:
    """Return the proxy's loss, float32 [n]; raise ConfigError if the stream has none."""
    if chunk.loss is None:
        raise ConfigError(
            "this strategy needs the proxy's loss of each sample, and the stream has none"
        )
    return chunk.loss


def difficulty_of(chunk: Chunk, by: str) -> np.ndarray:
    """Return the value that `SelectionOptions.difficulty` names, float32 [n], high for hard.

    "score", "loss", or "aum" for the negated margin: `loss` and `margin` are means over proxies.
    Raises ConfigError if the stream does not have it.
    """
    if by == "score":
        return chunk.score
    if by == "loss":
        return required_loss(chunk)
    if chunk.margin is None:
        raise ConfigError(
            "this strategy needs the proxy's margin of each sample, and the stream has none"
        )
    return -chunk.margin


class ByScore(Ranking):
    """Highest score first, or another difficulty (`difficulty_of`); all samples form one group."""

    def __init__(self, by: str = "score") -> None:
        self._by = by

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        value = difficulty_of(chunk, self._by)
        return order_key(value), np.zeros(len(value), np.int64)


class ClassesAsGroups(Ranking):
    """The keys of another ranking, or those of `order`, with the classes as groups.

    The unlabelled form one more group. Samples that the other ranking excludes are excluded here
    as well, except those marked ALWAYS, which come first.
    """

    def __init__(self, inner: Ranking, classes: int, order: Ranking | None = None) -> None:
        self._inner, self._classes, self._order = inner, classes, order or inner
        self.groups, self.needs_ids = classes + 1, inner.needs_ids or self._order.needs_ids

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, (_, group) = self._order.rank(chunk)[0], self._inner.rank(chunk)
        always = must_keep(chunk)
        label = class_groups(chunk.label, self._classes)
        return np.where(always, RESERVED_KEY, key), np.where((group < 0) & ~always, -1, label)


class WithinClasses(Ranking):
    """Another ranking with its groups split by class; the unlabelled form one more class.

    The group is class * groups + group.
    """

    def __init__(self, inner: Ranking, classes: int) -> None:
        self._inner, self._classes = inner, classes
        self.groups, self.needs_ids = (classes + 1) * inner.groups, inner.needs_ids

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, group = self._inner.rank(chunk)
        label = class_groups(chunk.label, self._classes)
        return key, np.where(group < 0, -1, label * self._inner.groups + group)


def within_classes(plan: SelectionPlan, classes: int, options: SelectionOptions) -> SelectionPlan:
    """Return a plan in which each class has its share of the list, by `options.quotas`.

    Within a class the list is divided as before.
    """

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        of_class = size.reshape(classes + 1, -1)
        totals = class_quotas(of_class.sum(axis=1), total, options.quotas, options.recall).tolist()
        return np.concatenate(
            [plan.quotas(sizes, share) for sizes, share in zip(of_class, totals, strict=True)]
        )

    return replace(plan, ranking=WithinClasses(plan.ranking, classes), quotas=quotas)


def grouped_by_class(ranking: Ranking, classes: int, options: SelectionOptions) -> Ranking:
    """Return the ranking, which has one group, with a group per class if `options.by_class`."""
    return WithinClasses(ranking, classes) if options.by_class else ranking


class ReservedFirst(Ranking):
    """Another ranking in which reserved samples come first in their group.

    Reserved are samples marked ALWAYS and the first of each class. One more group, the last, has
    the reserved samples that the other ranking excludes.

    Parameters
    ----------
    inner : Ranking
        The other ranking.
    first_of_class : Boundary, optional
        Where the reserved samples of each class end.
    """

    def __init__(self, inner: Ranking, first_of_class: Boundary | None) -> None:
        self._inner, self._first_of_class = inner, first_of_class
        self.groups = inner.groups + 1
        self.needs_ids = inner.needs_ids or (
            first_of_class is not None and first_of_class.needs_ids
        )

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, group = self._inner.rank(chunk)
        reserved = must_keep(chunk)
        if self._first_of_class is not None:
            reserved = reserved | self._first_of_class.mask(chunk)
        outsiders = reserved & (group < 0)
        return np.where(reserved, RESERVED_KEY, key), np.where(outsiders, self.groups - 1, group)


def must_keep(chunk: Chunk) -> np.ndarray:
    """Return which samples are marked ALWAYS, bool [n]."""
    return np.zeros(len(chunk.score), bool) if chunk.mark is None else chunk.mark == ALWAYS
