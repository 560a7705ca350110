"""A band of difficulty: without the hardest samples and without the easiest."""

from __future__ import annotations

from collections.abc import Sequence

from raypipe.selection.base import ByScore, SelectionOptions, SelectionPlan, one_group_quota
from raypipe.selection.hard_cutoff import Excluding, hardest_samples
from raypipe.selection.radix_select import ValidatedStream


def band(
    stream: ValidatedStream, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Plan to drop the hardest samples (`hard_cutoff`), and then the easiest.

    Used by SemiPrune (arXiv 2605.23198) and ELFS (Zheng et al., arXiv 2406.04273) with the AUM,
    with cut-offs searched for each dataset: 0.4 on CIFAR and 0.3 on ImageNet to keep 10 %. Here
    difficulty is `SelectionOptions.difficulty`, and the cut-off `auto` is that of `ccs`: as many of
    the hardest samples are dropped as of the easiest. Nested with a fixed cut-off.
    """
    cuts = hardest_samples(stream, keep, classes, options)
    by_difficulty = ByScore(options.difficulty)
    plans = [SelectionPlan(Excluding(by_difficulty, cut), one_group_quota) for cut in cuts]
    return plans if len(plans) == len(keep) else plans * len(keep)
