"""Keep-lists: exactly round(keep * N) samples, from a stream too long to sort or to hold.

A strategy is statistics gathered in passes over the stream, a ranking (score, label, sample_id) -> sortable number and group, and
quotas for the groups; `radix` finds where each group ends. A new one is a function in this package, a line in `STRATEGIES` and the
name in `SelectSettings.strategy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.errors import ConfigError
from raypipe.selection import deterministic, randomized
from raypipe.selection.base import ByClass, Options, Reserving, SelectionPlan, Strategy, apart
from raypipe.selection.hashing import IdSet, hash64, id_hash
from raypipe.selection.quotas import bounded, in_proportion, water_filled
from raypipe.selection.radix_select import (
    ALWAYS,
    FREE,
    NEVER,
    Boundary,
    Checked,
    Chunk,
    Chunks,
    Quotas,
    Ranking,
    boundaries,
    order_key,
)
from raypipe.selection.weights import Weights, inverse_inclusion, of_classes

__all__ = [
    "ALWAYS", "FREE", "NEVER", "STRATEGIES", "Chunk", "Chunks", "Cut", "IdSet", "Options", "hash64", "id_hash", "in_proportion",
    "needs_classes", "needs_loss", "order_key", "select", "water_filled",
]  # fmt: skip

STRATEGIES: dict[str, Strategy] = {
    "top": Strategy(deterministic.top),
    "balanced": Strategy(deterministic.balanced, nested=False, classes=True, by_class=True),
    "normalized": Strategy(deterministic.normalized, classes=True),
    "moderate": Strategy(deterministic.moderate),
    "mixed": Strategy(deterministic.mixed, difficulty=True),
    "random": Strategy(randomized.random, draws=True, scores=False),
    "ccs": Strategy(randomized.ccs, nested=False, draws=True, difficulty=True),
    "beta": Strategy(randomized.beta, nested=False, draws=True, loss=True),
}
"""Every strategy of `select.strategy`."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A keep-list: which samples of a chunk are in it, and their weights.

    fraction  the keep fraction it was made for
    """

    fraction: float
    boundary: Boundary
    weights: Weights | None

    @property
    def count(self) -> int:
        """Samples kept."""
        return self.boundary.count

    def mask(self, chunk: Chunk) -> np.ndarray:
        """Which samples of a chunk (with sample_ids) are kept: bool [n]."""
        return self.boundary.mask(chunk)

    def weight(self, chunk: Chunk, rows: np.ndarray) -> np.ndarray | None:
        """Weights of some samples of a chunk that are kept: float32 [rows]; None where none are asked for."""
        return None if self.weights is None else self.weights.of(chunk, rows)


def needs_classes(strategy: str, options: Options) -> bool:
    """Whether `select` must know the number of classes."""
    return (
        STRATEGIES[strategy].classes
        or options.by_class
        or options.min_per_class > 0
        or options.weights == "class"
    )


def needs_loss(strategy: str, options: Options) -> bool:
    """Whether `select` needs the proxy's loss of every sample in the stream."""
    return STRATEGIES[strategy].loss or (
        STRATEGIES[strategy].difficulty and options.difficulty == "loss"
    )


def select(
    chunks: Chunks,
    keep: Sequence[float],
    strategy: str = "top",
    classes: int = 0,
    options: Options | None = None,
    marked: bool = False,
) -> list[Cut]:
    """One cut for each keep fraction, in the order given; each keeps exactly round(fraction * N) of the N samples.

    classes  number of classes (labels are below it); see `needs_classes`
    marked   whether chunks have marks. N counts samples marked NEVER too, and those marked ALWAYS are part of the list: of their
             group's quota, where the strategy has groups
    With `options.by_class` the strategy works within each class, and every class has the same share of the list.
    With `options.min_per_class` m each class has its first m samples (or all it has), in the order of the strategy, in the list.
    Raises ConfigError for an unknown strategy, a fraction outside (0, 1], and what cannot be kept in so long a list or leaves too
    few; StageError for a score that is not finite.
    """
    options = options or Options()
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: {strategy!r} is not one of {', '.join(STRATEGIES)}")
    for fraction in keep:
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"keep: {fraction!r} is not a fraction of the samples: it must be above 0 and at most 1"
            )
    if options.weights == "inclusion" and (not STRATEGIES[strategy].draws or options.min_per_class):
        why = (
            f"{strategy} draws nothing at random"
            if not options.min_per_class
            else "min_per_class changes the probabilities"
        )
        raise ConfigError(
            f"weights: inclusion weighs by the probability of being drawn, but {why}; use weights: class"
        )
    stream = Checked(chunks)
    plans = STRATEGIES[strategy].plan(stream, keep, classes, options)
    if options.by_class and not STRATEGIES[strategy].by_class:
        plans = [apart(plan, classes) for plan in plans]
    if marked or options.min_per_class:
        plans = _reserve(stream, plans, classes, options.min_per_class)
    wants = [
        (plan.ranking, _exactly(stream, plan, fraction))
        for plan, fraction in zip(plans, keep, strict=True)
    ]
    ends = boundaries(stream, wants)
    weights: Sequence[Weights | None] = [None] * len(ends)
    if options.weights == "inclusion":
        weights = inverse_inclusion(stream, plans, ends)
    elif options.weights == "class":
        weights = of_classes(stream, ends, classes)
    return [
        Cut(float(fraction), end, weight)
        for fraction, end, weight in zip(keep, ends, weights, strict=True)
    ]


def _exactly(stream: Checked, plan: SelectionPlan, fraction: float) -> Quotas:
    """The plan's quotas for exactly round(fraction * N) samples, with all reserved ones and no more than each group has."""

    def quotas(size: np.ndarray, reserved: np.ndarray) -> np.ndarray:
        total = round(fraction * stream.samples)
        there, first = int(size.sum()), int(reserved.sum())
        if there < total:
            raise ConfigError(
                f"keep {fraction:g} asks for {total:,} of {stream.samples:,} samples, but only {there:,} may be kept: the others are "
                "in select.never_keep, near duplicates or beyond select.hard_cutoff. Keep less, or leave out fewer"
            )
        if first > total:
            raise ConfigError(
                f"keep {fraction:g} is a list of {total:,} samples, but {first:,} must be in it (select.always_keep, "
                "select.min_per_class). Keep more, or ask for fewer"
            )
        return bounded(plan.quotas(size, total), reserved, size, total)

    return quotas


def _reserve(
    stream: Chunks, plans: Sequence[SelectionPlan], classes: int, least: int
) -> list[SelectionPlan]:
    """Plans in which samples marked ALWAYS and the first `least` of each class come first."""
    rankings: dict[int, Ranking] = {}
    for plan in plans:
        if id(plan.ranking) in rankings:
            continue
        of_class = None
        if least:
            order = ByClass(plan.ranking, classes, plan.priority)
            (of_class,) = boundaries(stream, [(order, _least(least))])
        rankings[id(plan.ranking)] = Reserving(plan.ranking, of_class)
    return [
        SelectionPlan(rankings[id(plan.ranking)], _with_outsiders(plan), None, plan.inclusion)
        for plan in plans
    ]


def _least(least: int) -> Quotas:
    def quotas(size: np.ndarray, reserved: np.ndarray) -> np.ndarray:
        wanted = np.minimum(size, np.maximum(reserved, least))
        wanted[-1] = reserved[-1]  # the unlabelled are no class
        return wanted

    return quotas


def _with_outsiders(plan: SelectionPlan) -> Callable[[np.ndarray, int], np.ndarray]:
    """The plan's quotas, and one for the group of reserved samples that are out of the question: all of them."""

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        return np.append(plan.quotas(size[:-1], total - int(size[-1])), size[-1])

    return quotas
