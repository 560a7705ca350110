"""Strategies that draw samples at random, from a hash of the sample_id and the seed in place of a generator's state.

So a sample's luck is its own: the same in every order of the stream, on every machine, and when other samples come and go.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from raypipe.selection.base import Options, SelectionPlan, Top, everything, grouped, loss_of
from raypipe.selection.hashing import hash64, uniform
from raypipe.selection.quotas import water_filled
from raypipe.selection.radix_select import (
    FIRST,
    HIGHEST,
    Boundary,
    Checked,
    Chunk,
    Chunks,
    Quotas,
    Ranking,
    boundaries,
    key_value,
    order_key,
)

ANCHORS = 10
"""Samples of highest score whose mean probability sets the Beta distribution."""
CONCENTRATION = 15.0
"""C of the Beta distribution: alpha + beta = C + 1."""
LEAST_ERROR = 2.0**-24
"""1 - p is taken to be at least this, since the density has no bound at p = 1 where beta < 1."""


class Drawn(Ranking):
    """By the hash of sample_id and seed; one group."""

    needs_ids = True

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key = np.minimum(
            hash64(chunk.sample_id, self._seed) >> np.uint64(32), np.uint64(HIGHEST)
        ).astype(np.uint32)
        return key, np.zeros(len(key), np.int64)


def even(chunk: Chunk, boundary: Boundary) -> np.ndarray:
    """Inclusion probabilities where a group's samples have the same: quota / size, and 1 for reserved ones."""
    key, group = boundary.ranking.place(chunk)
    free = np.maximum(boundary.size - boundary.reserved, 1)
    share = np.append((boundary.quota - boundary.reserved) / free, 0.0)
    return np.where(key == FIRST, 1.0, share[group])


def random(
    chunks: Chunks, keep: Sequence[float], classes: int, options: Options
) -> list[SelectionPlan]:
    """A simple random sample: what every other strategy has to beat. The k highest hashes of sample_id and seed. Nested."""
    return [SelectionPlan(Drawn(options.seed), everything, inclusion=even)] * len(keep)


class Strata(Ranking):
    """Hashes within strata of equal width of the score; samples beyond a boundary are out of the question.

    low, high  range of the score: float64 [G], for each group of the boundary
    """

    needs_ids = True

    def __init__(
        self, seed: int, cut: Boundary, low: np.ndarray, high: np.ndarray, strata: int
    ) -> None:
        self._drawn, self._cut, self.groups = Drawn(seed), cut, strata
        width = (high - low) / strata
        self._low, self._width = (
            np.append(low, 0.0),
            np.append(np.where(width > 0, width, 1.0), 1.0),
        )  # group -1: out of the question

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        key, _ = self._drawn.place(chunk)
        _, part = self._cut.ranking.place(chunk)
        place = (chunk.score.astype(np.float64) - self._low[part]) / self._width[part]
        stratum = np.clip(np.floor(place), 0, self.groups - 1).astype(np.int64)
        return key, np.where(self._cut.mask(chunk), -1, stratum)


def ccs(
    chunks: Checked, keep: Sequence[float], classes: int, options: Options
) -> list[SelectionPlan]:
    """Coverage-centric coreset selection (Zheng et al., ICLR 2023, arXiv 2210.15809, algorithm 1).

        drop the floor(hard_cutoff n) hardest samples
        divide the range of the scores left into `strata` (50) intervals of equal width
        serve the strata from the smallest: min(size, floor(budget left / strata left)), drawn at random within

    Published with AUM as the difficulty that is cut off by, whatever the score; here it is the score, or the proxy's loss. The published
    cut-off is searched for each dataset and grows with the pruning (90 % pruned: CIFAR-10 0.3, CIFAR-100 0.5). `auto` grows likewise, in one
    rule: half of what is pruned are the hardest samples. Lists of one number are nested, those of `auto` are not. The published
    top edge, 1.0001 max, leaves out samples where all scores are negative; here the highest score belongs to the last stratum. With
    `Options.by_class` all of it is done within each class.
    """
    hardest = grouped(Top(options.difficulty), classes, options)
    fractions = keep if options.hard_cutoff == "auto" else keep[:1]
    cuts = boundaries(
        chunks,
        [(hardest, _hardest(chunks, fraction, options.hard_cutoff)) for fraction in fractions],
    )
    low, high = (np.full((len(cuts), hardest.groups), edge) for edge in (math.inf, -math.inf))
    for chunk in chunks(any(cut.needs_ids for cut in cuts)):
        score, (_, group), there = (
            chunk.score.astype(np.float64),
            hardest.place(chunk),
            chunk.eligible(),
        )
        for row, cut in enumerate(cuts):
            left = there & ~cut.mask(chunk)
            np.minimum.at(low[row], group[left], score[left])
            np.maximum.at(high[row], group[left], score[left])
    empty = low > high
    low[empty] = high[empty] = 0.0
    plans = [
        SelectionPlan(
            Strata(options.seed, cut, least, most, options.strata), water_filled, inclusion=even
        )
        for cut, least, most in zip(cuts, low, high, strict=True)
    ]
    return plans if len(plans) == len(keep) else plans * len(keep)


def _hardest(chunks: Checked, fraction: float, share: float | str) -> Quotas:
    """How many samples of each group are cut off."""

    def quotas(size: np.ndarray, _: np.ndarray) -> np.ndarray:
        there, kept = int(size.sum()), round(fraction * chunks.samples)
        cut = max(0.0, 0.5 * (1 - kept / max(there, 1))) if share == "auto" else float(share)
        return (cut * size).astype(np.int64)

    return quotas


class Gumbel(Ranking):
    """By log w - log E: w a sample's weight, E a standard exponential variable drawn from its hash; one group.

    The k highest are a weighted sample without replacement, the same as k draws one after the other with probabilities in
    proportion to the weights left (Efraimidis & Spirakis 2006: keys u^(1/w)). A weight of 0 comes after all others.
    """

    needs_ids = True

    def __init__(self, seed: int, alpha: float, beta: float, shift: float) -> None:
        self._seed, self._alpha, self._beta, self._shift = seed, alpha, beta, shift

    def log_weight(self, chunk: Chunk) -> np.ndarray:
        """log of w = Beta(p; alpha, beta) (s - shift), but for a constant: float64 [n]."""
        loss = loss_of(chunk).astype(np.float64)
        error = np.maximum(-np.expm1(-loss), LEAST_ERROR)
        with np.errstate(divide="ignore"):
            score = np.log(chunk.score.astype(np.float64) - self._shift)
        return (self._alpha - 1) * -loss + (self._beta - 1) * np.log(error) + score

    def rank(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        drawn = np.log(-np.log(uniform(hash64(chunk.sample_id, self._seed))))
        return order_key((self.log_weight(chunk) - drawn).astype(np.float32)), np.zeros(
            len(drawn), np.int64
        )


def conditional(ranking: Gumbel, chunk: Chunk, boundary: Boundary) -> np.ndarray:
    """Inclusion probabilities given the last key t that is taken: P(log w - log E >= t) = 1 - exp(-w exp(-t)).

    Rank conditioning of bottom-k samples (Cohen & Kaplan 2007, "Summarizing data using bottom-k sketches"). Their t is the
    first key that is not taken, which differs by about 1/k. All are 1 where samples of weight 0 have to fill the list.
    """
    key, group = boundary.ranking.place(chunk)
    last = key_value(boundary.threshold).astype(np.float64)
    whole = np.append(boundary.quota == boundary.size, False) | ~np.isfinite(last)
    beyond = np.minimum(ranking.log_weight(chunk) - np.where(whole, 0.0, last)[group], 700.0)
    return np.where((key == FIRST) | whole[group], 1.0, -np.expm1(-np.exp(beyond)))


def beta(
    chunks: Chunks, keep: Sequence[float], classes: int, options: Options
) -> list[SelectionPlan]:
    """DUAL's Beta sampling (Cho et al., ICML 2025, arXiv 2502.06905, and its published code), adaptive to the keep fraction.

        r = 1 - keep;   b = 15 (1 - m) (1 - r^c);   a = 16 - b;   c = beta_exponent
        w(x) = Beta density(p(x); a, b) * score(x);   k samples without replacement, in proportion to w

    p is a sample's mean predicted probability of its label and m the mean p of the 10 samples of highest score; c is 4 by default in
    the code (CIFAR-100). The more is pruned, the easier the samples it prefers.

    Deviations: p is that of the finished proxy, exp(-loss), since the mean over epochs is known of measured samples only;
    the proxy was trained on those of the seed set, so their p is higher than that of samples like them. A score may be negative
    here: w then uses score - min score. 1 - p is at least 2^-24. Not nested, since the density changes with the fraction.
    """
    anchors, low = _anchors(chunks, options.seed)
    plans = []
    for fraction in keep:
        b = CONCENTRATION * (1 - anchors) * (1 - (1 - fraction) ** options.beta_exponent)
        ranking = Gumbel(options.seed, CONCENTRATION + 1 - b, b, low)
        plans.append(
            SelectionPlan(ranking, everything, inclusion=functools.partial(conditional, ranking))
        )
    return plans


def _anchors(chunks: Chunks, seed: int) -> tuple[float, float]:
    """Mean p of the samples of highest score (ties by hash), and what scores are shifted by: the lowest, where it is below 0."""
    low = 0.0
    best = np.zeros((0, 3))  # score, hash, p
    for chunk in chunks(True):
        score = chunk.score.astype(np.float64)
        there = chunk.eligible()
        low = float(score[there].min(initial=low))
        least = best[-1, 0] if len(best) == ANCHORS else -math.inf
        rows = np.flatnonzero(there & (score >= least))
        if not len(rows):
            continue
        hashes = uniform(hash64(chunk.sample_id, seed))
        found = np.stack(
            [score[rows], hashes[rows], np.exp(-loss_of(chunk)[rows].astype(np.float64))], 1
        )
        best = np.concatenate([best, found])
        best = best[np.lexsort((-best[:, 1], -best[:, 0]))][:ANCHORS]
    return (math.fsum(best[:, 2]) / len(best) if len(best) else 0.0), low
