"""Foresee a seed set, or a part of it, that is too small to train a proxy on."""

from __future__ import annotations

import math

from raypipe.estimate.facts import ClassBalance
from raypipe.estimate.workload import Workload
from raypipe.runs.sizes import MIN_SEED_SAMPLES
from raypipe.text import percent

LEAST_CHANCE = 0.01
"""Chance of a run that stops from which on it is reported."""


def small_seed_set(work: Workload, balance: ClassBalance | None = None) -> str:
    """Return a sentence if a run can stop because too few samples are drawn; else nothing.

    Hashes of the ids decide which samples are in the seed set, and in which part of it. How many
    there are in a part is therefore a binomial number, and one part in three can miss the minimum
    although the mean is above it.
    """
    config = work.config
    fraction, parts = config.seed.fraction, config.proxy.parts
    readable = min(work.samples, round(work.seed / fraction))
    others = 1.0 if balance is None or config.unsupervised else _outside_largest(balance)
    chance = _chance_of_stopping(readable, fraction, parts, others)
    if chance < LEAST_CHANCE:
        return ""
    classes = "" if config.unsupervised else " of 2 classes"
    whole = "the seed set" if parts == 1 else f"each of the {parts} parts of the seed set"
    problem = (
        f"a run stops, with a chance of {percent(chance)}: {whole} needs {MIN_SEED_SAMPLES} "
        f"samples{classes}, and about {readable * fraction / parts:,.0f} are drawn"
    )
    for hundredths in range(math.floor(100 * fraction) + 1, 101):
        if _chance_of_stopping(readable, hundredths / 100, parts, others) < LEAST_CHANCE:
            fewer = "" if parts == 1 else ", or lower proxy.parts"
            return f"{problem}. Raise seed.fraction to {hundredths / 100:g} or more{fewer}"
    if parts > 1 and _chance_of_stopping(readable, 1, 1, others) < LEAST_CHANCE:
        return f"{problem}. Lower proxy.parts and raise seed.fraction, or add samples"
    return f"{problem}. The source has too few samples"


def _outside_largest(balance: ClassBalance) -> float:
    """Return the share of the labelled samples that are not of the largest class."""
    return 1 - balance.largest / max(1, sum(balance.per_class.values()))


def _chance_of_stopping(samples: int, fraction: float, parts: int, others: float) -> float:
    """Return the chance that a part has too few samples, or none outside the largest class."""
    share = fraction / parts
    too_few = _fewer_than(MIN_SEED_SAMPLES, samples, share)
    one_class = (1 - share) ** (samples * others)
    return 1 - (1 - min(1.0, too_few + one_class)) ** parts


def _fewer_than(least: int, draws: int, share: float) -> float:
    """Return P(X < least) for a binomial X."""
    if draws < least or share >= 1:
        return float(draws < least)
    logs = (
        math.lgamma(draws + 1)
        - math.lgamma(k + 1)
        - math.lgamma(draws - k + 1)
        + k * math.log(share)
        + (draws - k) * math.log1p(-share)
        for k in range(least)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))
