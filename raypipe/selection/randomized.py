"""Strategies that draw samples at random, by a hash of the sample_id and the seed.

There is no generator with a state. So whether a sample is drawn does not depend on the order of the
stream or on the machine, and its hash stays the same when other samples come and go.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from raypipe.selection.base import (
    SelectionOptions,
    SelectionPlan,
    one_group_quota,
    required_loss,
)
from raypipe.selection.hard_cutoff import hardest_samples
from raypipe.selection.hashing import hash64, uniform
from raypipe.selection.quotas import even_quotas
from raypipe.selection.radix_select import (
    MAX_KEY,
    RESERVED_KEY,
    Boundary,
    Chunk,
    Chunks,
    Ranking,
    ValidatedStream,
    key_value,
    order_key,
)
from raypipe.selection.strata import score_strata

ANCHORS = 10
"""Number of samples with the highest score whose mean probability sets the Beta distribution."""
CONCENTRATION = 15.0
"""C of the Beta distribution: alpha + beta = C + 1."""
MIN_ERROR = 2.0**-24
"""Lower bound of 1 - p: at p = 1 the density is unbounded where beta < 1."""


class ByHash(Ranking):
    """By the hash of sample_id and seed; one group."""

    needs_ids = True

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key = np.minimum(
            hash64(chunk.sample_id, self._seed) >> np.uint64(32), np.uint64(MAX_KEY)
        ).astype(np.uint32)
        return key, np.zeros(len(key), np.int64)


def uniform_inclusion(chunk: Chunk, boundary: Boundary) -> np.ndarray:
    """Return inclusion probabilities that are equal within a group.

    They are quota / size, and 1 for reserved samples.
    """
    key, group = boundary.ranking.rank(chunk)
    free = np.maximum(boundary.size - boundary.reserved, 1)
    share = np.append((boundary.quota - boundary.reserved) / free, 0.0)
    return np.where(key == RESERVED_KEY, 1.0, share[group])


def random(
    chunks: Chunks, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Plan to keep a simple random sample, the baseline for every other strategy.

    The list has the k highest hashes of sample_id and seed. Nested.
    """
    return [
        SelectionPlan(ByHash(options.seed), one_group_quota, inclusion=uniform_inclusion)
    ] * len(keep)


def ccs(
    chunks: ValidatedStream, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """Coverage-centric coreset selection (Zheng et al., ICLR 2023, arXiv 2210.15809, algorithm 1).

        drop the floor(hard_cutoff n) hardest samples
        divide the range of the remaining scores into `strata` (50) intervals of equal width
        serve the strata from the smallest: min(size, floor(budget left / strata left)),
        drawn at random within

    The paper cuts off by AUM, whatever the score; here difficulty is the score, or the proxy's
    loss. The published cut-off is searched for each dataset and grows with the pruning (90 %
    pruned: CIFAR-10 0.3, CIFAR-100 0.5). `auto` grows likewise, by one rule: half of what is
    pruned are the hardest samples. Lists with a fixed cut-off are nested, those of `auto` are
    not. The published upper edge, 1.0001 max, excludes samples if all scores are negative; here
    the highest score belongs to the last stratum. With `SelectionOptions.by_class` all of this is
    done within each class.
    """
    cuts = hardest_samples(chunks, keep, classes, options)
    strata = score_strata(chunks, ByHash(options.seed), cuts, options.strata)
    plans = [SelectionPlan(ranking, even_quotas, inclusion=uniform_inclusion) for ranking in strata]
    return plans if len(plans) == len(keep) else plans * len(keep)


class GumbelTopK(Ranking):
    """By log w - log E: w is a sample's weight, E a standard exponential variable from its hash.

    All samples form one group. The k highest are a weighted sample without replacement, the same
    as k successive draws with probabilities proportional to the remaining weights (Efraimidis &
    Spirakis 2006: keys u^(1/w)). Samples of weight 0 come last.
    """

    needs_ids = True

    def __init__(self, seed: int, alpha: float, beta: float, shift: float) -> None:
        self._seed, self._alpha, self._beta, self._shift = seed, alpha, beta, shift

    def log_weight(self, chunk: Chunk) -> np.ndarray:
        """Return log of w = Beta(p; alpha, beta) (s - shift), up to a constant, float64 [n]."""
        loss = required_loss(chunk).astype(np.float64)
        error = np.maximum(-np.expm1(-loss), MIN_ERROR)
        with np.errstate(divide="ignore"):
            score = np.log(chunk.score.astype(np.float64) - self._shift)
        return (self._alpha - 1) * -loss + (self._beta - 1) * np.log(error) + score

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        drawn = np.log(-np.log(uniform(hash64(chunk.sample_id, self._seed))))
        return order_key((self.log_weight(chunk) - drawn).astype(np.float32)), np.zeros(
            len(drawn), np.int64
        )


def conditional_inclusion(ranking: GumbelTopK, chunk: Chunk, boundary: Boundary) -> np.ndarray:
    """Return inclusion probabilities given the last key t that is taken.

    P(log w - log E >= t) = 1 - exp(-w exp(-t)): rank conditioning of bottom-k samples (Cohen &
    Kaplan 2007, "Summarizing data using bottom-k sketches"). Their t is the first key that is not
    taken, which differs by about 1/k. All probabilities are 1 if samples of weight 0 are needed
    to fill the list.
    """
    key, group = boundary.ranking.rank(chunk)
    last = key_value(boundary.threshold).astype(np.float64)
    whole = np.append(boundary.quota == boundary.size, False) | ~np.isfinite(last)
    beyond = np.minimum(ranking.log_weight(chunk) - np.where(whole, 0.0, last)[group], 700.0)
    return np.where((key == RESERVED_KEY) | whole[group], 1.0, -np.expm1(-np.exp(beyond)))


def beta(
    chunks: Chunks, keep: Sequence[float], classes: int, options: SelectionOptions
) -> list[SelectionPlan]:
    """DUAL's Beta sampling, adaptive to the keep fraction.

        r = 1 - keep;   b = 15 (1 - m) (1 - r^c);   a = 16 - b;   c = beta_exponent
        w(x) = Beta density(p(x); a, b) * score(x);
        k samples without replacement, in proportion to w

    Cho et al., ICML 2025 (arXiv 2502.06905), and its published code. p is a sample's mean
    predicted probability of its label and m the mean p of the 10 samples with the highest score.
    c is 4 by default in the code (CIFAR-100). The more is pruned, the easier the preferred
    samples.

    Deviations: p is that of the finished proxy, exp(-loss), because the mean over epochs is known
    for measured samples only. With cross-fitting, the loss is the mean over proxies that were not
    trained on the sample. With one proxy, which was trained on the seed set, the p of its samples
    is higher than that of similar samples. Scores can be negative here: w then uses score - min
    score. 1 - p is at least 2^-24. Not nested, since the density changes with the fraction.
    """
    anchors, low = _anchors(chunks, options.seed)
    plans = []
    for fraction in keep:
        b = CONCENTRATION * (1 - anchors) * (1 - (1 - fraction) ** options.beta_exponent)
        ranking = GumbelTopK(options.seed, CONCENTRATION + 1 - b, b, low)
        plans.append(
            SelectionPlan(
                ranking,
                one_group_quota,
                inclusion=functools.partial(conditional_inclusion, ranking),
            )
        )
    return plans


def _anchors(chunks: Chunks, seed: int) -> tuple[float, float]:
    """Return the mean p of the samples with the highest score, and the shift of the scores.

    Ties are broken by hash. The shift is the lowest score if it is below 0, else 0.
    """
    low = 0.0
    best = np.zeros((0, 3))  # score, hash, p
    for chunk in chunks(True):
        score = chunk.score.astype(np.float64)
        eligible = chunk.eligible()
        low = float(score[eligible].min(initial=low))
        minimum = best[-1, 0] if len(best) == ANCHORS else -math.inf
        rows = np.flatnonzero(eligible & (score >= minimum))
        if not len(rows):
            continue
        hashes = uniform(hash64(chunk.sample_id, seed))
        p = np.exp(-required_loss(chunk)[rows].astype(np.float64))
        best = np.concatenate([best, np.stack([score[rows], hashes[rows], p], 1)])
        best = best[np.lexsort((-best[:, 1], -best[:, 0]))][:ANCHORS]
    return (math.fsum(best[:, 2]) / len(best) if len(best) else 0.0), low
