"""Cut keep-lists: resolve a strategy's plans, find where each list ends, and compute weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.errors import ConfigError
from raypipe.selection.base import (
    ClassesAsGroups,
    ReservedFirst,
    SelectionOptions,
    SelectionPlan,
    Strategy,
    within_classes,
)
from raypipe.selection.quotas import bounded_quotas
from raypipe.selection.radix_select import (
    Boundary,
    Chunk,
    Chunks,
    EmbeddedChunks,
    Quotas,
    Ranking,
    ValidatedStream,
    find_boundaries,
)
from raypipe.selection.strategies import find_strategy
from raypipe.selection.weights import Weights, class_weights, inverse_inclusion_weights


@dataclass(frozen=True, eq=False)
class Selection:
    """A keep-list as a rule: which samples of a chunk are in it, and their weights.

    Attributes
    ----------
    fraction : float
        The keep fraction it was computed for.
    boundary : Boundary
        Where each group of the strategy's ranking ends.
    weights : Weights or None
        How samples are weighted; None if no weights were requested.
    """

    fraction: float
    boundary: Boundary
    weights: Weights | None

    @property
    def count(self) -> int:
        """Number of samples in the list."""
        return self.boundary.count

    def mask(self, chunk: Chunk) -> np.ndarray:
        """Return which samples of a chunk (with sample_ids) are in the list, bool [n]."""
        return self.boundary.mask(chunk)

    def weight(self, chunk: Chunk, rows: np.ndarray) -> np.ndarray | None:
        """Return the weights of listed samples of a chunk, float32 [rows]; None without weights."""
        return None if self.weights is None else self.weights.of(chunk, rows)


def select(
    chunks: Chunks,
    keep: Sequence[float],
    strategy: str | Strategy = "top",
    classes: int = 0,
    options: SelectionOptions | None = None,
    marked: bool = False,
    embedded: EmbeddedChunks | None = None,
) -> list[Selection]:
    """Return one keep-list per fraction; each has exactly round(fraction * N) of the N samples.

    Parameters
    ----------
    chunks : Chunks
        The stream of scores.
    keep : Sequence[float]
        Keep fractions, above 0 and at most 1.
    strategy : str or Strategy
        A name of `STRATEGIES` or of a strategy from outside, or a strategy.
    classes : int
        Number of classes; labels are below it. See `needs_classes`.
    options : SelectionOptions, optional
        With `by_class` the strategy works within each class, and every class has the same share of
        the list. With `min_per_class` m each class has at least its first m samples (or all it has)
        in the list, in the order of the strategy.
    marked : bool
        Whether chunks have marks. N includes samples marked NEVER. Samples marked ALWAYS are part
        of the list and count towards the quota of their group, if the strategy has groups.
    embedded : EmbeddedChunks, optional
        The stream with embeddings, for strategies that need them (`Strategy.needs_embeddings`). All
        chunks must then have a position.

    Returns
    -------
    list[Selection]
        In the order of `keep`.

    Raises
    ------
    ConfigError
        For an unknown strategy, a fraction outside (0, 1], and options that leave too few samples
        or reserve too many for a list of the requested length.
    StageError
        For a score that is not finite.
    """
    options = options or SelectionOptions()
    rule = strategy if isinstance(strategy, Strategy) else find_strategy(strategy)
    _check_arguments(keep, rule, options, strategy if isinstance(strategy, str) else "it")
    stream = ValidatedStream(chunks, embedded)
    plans = rule.plan(stream, keep, classes, options)
    if options.by_class and not rule.balances_classes:
        plans = [within_classes(plan, classes, options) for plan in plans]
    if marked or options.min_per_class:
        plans = _with_reserved(stream, plans, classes, options.min_per_class)
    requests = [
        (plan.ranking, _exact_quotas(stream, plan, fraction))
        for plan, fraction in zip(plans, keep, strict=True)
    ]
    boundaries = find_boundaries(stream, requests)
    weights: Sequence[Weights | None] = [None] * len(boundaries)
    if options.weights == "inclusion":
        weights = inverse_inclusion_weights(stream, plans, boundaries)
    elif options.weights == "class":
        weights = class_weights(stream, boundaries, classes)
    return [
        Selection(float(fraction), boundary, weight)
        for fraction, boundary, weight in zip(keep, boundaries, weights, strict=True)
    ]


def _check_arguments(
    keep: Sequence[float], rule: Strategy, options: SelectionOptions, name: str
) -> None:
    for fraction in keep:
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"keep: {fraction!r} is not a fraction of the samples; it must be above 0 and at "
                "most 1"
            )
    if options.weights != "inclusion":
        return
    if options.min_per_class:
        reason = "min_per_class changes the probabilities"
    elif not rule.draws_at_random:
        reason = f"{name} draws nothing at random"
    else:
        return
    raise ConfigError(
        f"weights: inclusion weights by the probability of being drawn, but {reason}; use "
        "weights: class"
    )


def _exact_quotas(stream: ValidatedStream, plan: SelectionPlan, fraction: float) -> Quotas:
    """Return the plan's quotas for a list of exactly round(fraction * N) samples.

    They include all reserved samples and give no group more than it has.
    """

    def quotas(size: np.ndarray, reserved: np.ndarray) -> np.ndarray:
        total = round(fraction * stream.samples)
        eligible, required = int(size.sum()), int(reserved.sum())
        if eligible < total:
            raise ConfigError(
                f"keep {fraction:g} asks for {total:,} of {stream.samples:,} samples, but only "
                f"{eligible:,} are eligible: the others are in select.never_keep, near duplicates "
                "or beyond select.hard_cutoff. Keep less, or exclude fewer"
            )
        if required > total:
            raise ConfigError(
                f"keep {fraction:g} is a list of {total:,} samples, but {required:,} must be in it "
                "(select.always_keep, select.min_per_class). Keep more, or require fewer"
            )
        return bounded_quotas(plan.quotas(size, total), reserved, size, total)

    return quotas


def _with_reserved(
    stream: Chunks, plans: Sequence[SelectionPlan], classes: int, min_per_class: int
) -> list[SelectionPlan]:
    """Return plans that reserve the samples marked ALWAYS and `min_per_class` of each class."""
    rankings: dict[int, Ranking] = {}  # plans can share a ranking
    for plan in plans:
        if id(plan.ranking) in rankings:
            continue
        first_of_class = None
        if min_per_class:
            order = ClassesAsGroups(plan.ranking, classes, plan.priority)
            (first_of_class,) = find_boundaries(stream, [(order, _class_minimum(min_per_class))])
        rankings[id(plan.ranking)] = ReservedFirst(plan.ranking, first_of_class)
    return [
        SelectionPlan(rankings[id(plan.ranking)], _with_outsiders(plan), None, plan.inclusion)
        for plan in plans
    ]


def _class_minimum(minimum: int) -> Quotas:
    """Return quotas of at least `minimum` samples per class, or all a class has."""

    def quotas(size: np.ndarray, reserved: np.ndarray) -> np.ndarray:
        result = np.minimum(size, np.maximum(reserved, minimum))
        result[-1] = reserved[-1]  # the last group, the unlabelled, is not a class
        return result

    return quotas


def _with_outsiders(plan: SelectionPlan) -> Callable[[np.ndarray, int], np.ndarray]:
    """Return the plan's quotas with one more group, of which all samples are taken.

    The group holds reserved samples that the plan's ranking excludes (see `ReservedFirst`).
    """

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        return np.append(plan.quotas(size[:-1], total - int(size[-1])), size[-1])

    return quotas
