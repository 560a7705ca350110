"""The registry of keep-list strategies.

A strategy is a function that returns one `SelectionPlan` per keep fraction: a ranking, which gives
every sample a sortable key and a group, and quotas, which say how many samples each group gets. It
can gather statistics in passes over the stream first. `raypipe.selection.radix_select` then finds
where each group ends.

To add a strategy:

1. Write the function, in `raypipe.selection.deterministic`, or in `raypipe.selection.randomized` if
   it draws samples at random.
2. Add an entry to `STRATEGIES`.
3. Add the name to `StrategyName`, `ScoreStrategyName` (if it uses the scores), `STRATEGY_TEXTS` and
   `RANDOM_STRATEGIES` (if it draws) in `raypipe.config.choices`. The settings, the command line and
   the report follow from these. A test checks that they agree with `STRATEGIES`.

For example, the lowest scores::

    class LowestFirst(Ranking):
        def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
            return order_key(-chunk.score), np.zeros(len(chunk.score), np.int64)  # one group

    def bottom(chunks, keep, classes, options):
        return [SelectionPlan(LowestFirst(), one_group_quota)] * len(keep)

    STRATEGIES["bottom"] = Strategy(bottom)
"""

from __future__ import annotations

from raypipe.selection import deterministic, randomized
from raypipe.selection.base import SelectionOptions, Strategy

STRATEGIES: dict[str, Strategy] = {
    "top": Strategy(deterministic.top),
    "balanced": Strategy(
        deterministic.balanced, nested=False, uses_classes=True, balances_classes=True
    ),
    "normalized": Strategy(deterministic.normalized, uses_classes=True),
    "moderate": Strategy(deterministic.moderate),
    "mixed": Strategy(deterministic.mixed, uses_difficulty=True),
    "random": Strategy(randomized.random, draws_at_random=True, uses_scores=False),
    "ccs": Strategy(randomized.ccs, nested=False, draws_at_random=True, uses_difficulty=True),
    "beta": Strategy(randomized.beta, nested=False, draws_at_random=True, needs_loss=True),
}
"""Every strategy of `select.strategy` by name."""


def needs_classes(strategy: str, options: SelectionOptions) -> bool:
    """Whether `select` must be given the number of classes."""
    return (
        STRATEGIES[strategy].uses_classes
        or options.by_class
        or options.min_per_class > 0
        or options.weights == "class"
    )


def needs_loss(strategy: str, options: SelectionOptions) -> bool:
    """Whether `select` needs the proxy's loss of every sample in the stream."""
    return STRATEGIES[strategy].needs_loss or (
        STRATEGIES[strategy].uses_difficulty and options.difficulty == "loss"
    )
