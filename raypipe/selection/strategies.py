"""The registry of keep-list strategies.

A strategy is a function that returns one `SelectionPlan` per keep fraction: a ranking, which gives
every sample a sortable key and a group, and quotas, which say how many samples each group gets. It
can gather statistics in passes over the stream first. `raypipe.selection.radix_select` then finds
where each group ends.

To add a strategy:

1. Write the function. If it compares samples by their embeddings, it reads them in the blocks of
   `raypipe.selection.blocks`, and computes one number for each sample.
2. Add an entry to `STRATEGIES`.
3. Add the name to `ScoreStrategyName`, `STRATEGY_TEXTS` and, if it applies, `RANDOM_STRATEGIES` (it
   draws), `CUTTING_STRATEGIES` (it leaves out the hardest samples first) and `CLASSWISE_STRATEGIES`
   (it works within classes by default) in `raypipe.config.choices`. The settings, the command line
   and the report follow from these. A test checks that they agree with `STRATEGIES`.

For example, the lowest scores::

    class LowestFirst(Ranking):
        def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
            return order_key(-chunk.score), np.zeros(len(chunk.score), np.int64)  # one group

    def bottom(chunks, keep, classes, options):
        return [SelectionPlan(LowestFirst(), one_group_quota)] * len(keep)

    STRATEGIES["bottom"] = Strategy(bottom)
"""

from __future__ import annotations

import socket

from raypipe.errors import ConfigError
from raypipe.plugins import STRATEGY, declared, is_reference
from raypipe.selection import deterministic, randomized
from raypipe.selection.band import band
from raypipe.selection.base import SelectionOptions, Strategy
from raypipe.selection.coverage import coverage
from raypipe.selection.d2 import d2
from raypipe.selection.infomax import infomax
from raypipe.selection.outside import outside_strategy
from raypipe.selection.typical import typical

STRATEGIES: dict[str, Strategy] = {
    "random": Strategy(randomized.random, draws_at_random=True, uses_scores=False),
    "top": Strategy(deterministic.top),
    "balanced": Strategy(
        deterministic.balanced, nested=False, uses_classes=True, balances_classes=True
    ),
    "normalized": Strategy(deterministic.normalized, uses_classes=True),
    "moderate": Strategy(deterministic.moderate),
    "mixed": Strategy(deterministic.mixed, uses_difficulty=True),
    "ccs": Strategy(randomized.ccs, nested=False, draws_at_random=True, uses_difficulty=True),
    "beta": Strategy(randomized.beta, nested=False, draws_at_random=True, needs_loss=True),
    "band": Strategy(band, nested=False, uses_difficulty=True),
    "d2": Strategy(d2, nested=False, uses_difficulty=True, needs_embeddings=True),
    "infomax": Strategy(infomax, nested=False, uses_difficulty=True, needs_embeddings=True),
    "coverage": Strategy(coverage, nested=False, uses_difficulty=True, needs_embeddings=True),
    "typical": Strategy(typical, uses_scores=False, needs_embeddings=True),
}
"""Every strategy of raypipe by name."""


def find_strategy(name: str) -> Strategy:
    """Return a strategy by name, also one from outside.

    Raises
    ------
    ConfigError
        If no strategy has this name, or its code cannot be imported here.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if not is_reference(name) and name not in declared(STRATEGY):
        raise ConfigError(
            f"strategy: {name!r} is not one of {', '.join(STRATEGIES)}, and no package installed "
            f"on {socket.gethostname()} declares it"
        )
    return outside_strategy(name)


def needs_classes(strategy: str, options: SelectionOptions) -> bool:
    """Whether `select` must be given the number of classes."""
    return (
        find_strategy(strategy).uses_classes
        or options.by_class
        or options.min_per_class > 0
        or options.weights == "class"
    )


def needs_embeddings(strategy: str) -> bool:
    """Whether `select` needs the stream with embeddings."""
    return find_strategy(strategy).needs_embeddings


def needs_loss(strategy: str, options: SelectionOptions) -> bool:
    """Whether `select` needs the proxy's loss of every sample in the stream."""
    return find_strategy(strategy).needs_loss or (
        find_strategy(strategy).uses_difficulty and options.difficulty == "loss"
    )


def needs_margin(strategy: str, options: SelectionOptions) -> bool:
    """Whether `select` needs the proxy's margin of every sample in the stream."""
    return find_strategy(strategy).uses_difficulty and options.difficulty == "aum"
