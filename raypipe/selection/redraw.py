"""Other samples in every epoch: fixed-size draws with given probabilities, by hashes of the ids.

A training on a fixed list sees the same share of the samples in every epoch. A training on another
draw in every epoch takes as many steps and sees all of them in the end (RS2, Okanovic et al., ICLR
2024, arXiv 2305.18424).
"""

from __future__ import annotations

import numpy as np

from raypipe.selection.hashing import hash64, mix_hashes, uniform


def inclusion_probabilities(score: np.ndarray, count: int, ratio: float = 1.0) -> np.ndarray:
    """Return the probability of each sample to be drawn, float64 [n] with sum `count`.

    The probability is proportional to ratio^q, with q the quantile of the score from 0 to 1, and at
    most 1; what is above 1 is given to the other samples. Equal scores have equal probabilities.

    Parameters
    ----------
    score : np.ndarray
        Finite scores, float [n].
    count : int
        Samples to draw, from 1 to n.
    ratio : float
        Probability of the highest score, in units of that of the lowest; 1 is the uniform draw of
        RS2.
    """
    _, which, counts = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2  # mean rank of equal scores
    weight = ratio ** (middle / max(1, len(score) - 1))[which]
    probability, certain = np.zeros(len(score)), np.zeros(len(score), bool)
    while True:
        left = count - int(certain.sum())
        probability = np.where(certain, 1.0, left * weight / max(weight[~certain].sum(), 1e-300))
        beyond = ~certain & (probability >= 1)
        if not beyond.any():
            return probability
        certain |= beyond


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed for hashes that differs for each epoch."""
    return int(hash64([str(epoch)], seed)[0])


def draw(hashes: np.ndarray, probability: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Draw exactly as many samples as the sum of the probabilities, each with its own probability.

    This is systematic sampling (Madow 1949) along an order that is another in every epoch: points
    at distance 1, with a random start, on the cumulative probabilities. The order and the start
    depend on the ids, the seed and the epoch alone. If all probabilities are equal, it is a simple
    random sample.

    Parameters
    ----------
    hashes : np.ndarray
        Hash of the id of each sample, uint64 [n].
    probability : np.ndarray
        float64 [n], at most 1, with a whole number as the sum.
    seed, epoch : int
        Another pair draws other samples.

    Returns
    -------
    np.ndarray
        The rows of the samples, int64, rising.
    """
    own_seed = epoch_seed(seed, epoch)
    certain = np.flatnonzero(probability >= 1)
    open_rows = np.flatnonzero(probability < 1)
    order = open_rows[np.argsort(mix_hashes(hashes[open_rows], own_seed), kind="stable")]
    count = round(float(probability[order].sum()))
    ends = np.cumsum(probability[order])
    points = uniform(hash64(["start"], own_seed)) + np.arange(count)
    # the sum can be lower than a whole number by rounding
    drawn = order[np.minimum(np.searchsorted(ends, points), len(order) - 1)]
    return np.sort(np.concatenate([certain, drawn]))


def unbiased_weights(probability: np.ndarray) -> np.ndarray:
    """Return weights w such that the mean of w * loss over a draw estimates that over all samples.

    w = k / (n p), after Horvitz & Thompson 1952; k is the number of samples drawn, n of all, and
    p the probability. Returns float32 [n].
    """
    return (probability.sum() / (len(probability) * probability)).astype(np.float32)
