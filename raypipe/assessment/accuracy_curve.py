"""Accuracy against the number of training samples, by a power law of the error.

Error rates of networks fall about as a power of the number of samples (Hestness et al. 2017,
arXiv 1712.00409): log error = a + b log2(samples of each class). Random lists of any size are
points of this curve. It has no floor, so that what a larger set gains is overestimated where the
error has stopped falling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raypipe.assessment.gains import CONFIDENCE

RESAMPLES = 400
"""Bootstrap resamples, over repeats and over test samples."""


@dataclass(frozen=True, eq=False)
class AccuracyCurve:
    """The fitted curve.

    Attributes
    ----------
    line
        a and b, float64 [2].
    resampled
        The same of each bootstrap resample, float64 [RESAMPLES, 2].
    """

    line: np.ndarray
    resampled: np.ndarray

    def accuracy(self, position: float) -> tuple[float, float, float]:
        """Return the accuracy at log2(samples of each class), and its 95 % interval."""
        return self._with_interval(lambda line: 1 - _error(line, position))

    def gap(self, first: float, second: float) -> tuple[float, float, float]:
        """Return accuracy at `first` minus accuracy at `second`, and its 95 % interval."""
        return self._with_interval(lambda line: _error(line, second) - _error(line, first))

    def _with_interval(
        self, figure: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[float, float, float]:
        half = (1 - CONFIDENCE) / 2
        low, high = np.quantile(figure(self.resampled), [half, 1 - half])
        return float(figure(self.line[None])[0]), float(low), float(high)


def _error(lines: np.ndarray, position: float) -> np.ndarray:
    return np.minimum(1.0, np.exp(lines[:, 0] + lines[:, 1] * position))


def fit_accuracy(correct: np.ndarray, position: np.ndarray, seed: int = 0) -> AccuracyCurve:
    """Fit the curve to models on random lists.

    Parameters
    ----------
    correct
        Right or wrong (1 or 0), [cells, repeats, test samples].
    position
        log2(samples of each class) of the lists, float64 [cells].
    seed
        Of the bootstrap.

    Notes
    -----
    The slope is never positive: more samples do not hurt.
    """
    _, repeats, tested = correct.shape
    draw = np.random.default_rng(seed)
    values = correct.astype(np.float64)
    lines = [_line(1 - values.mean((1, 2)), position, tested)]
    for _ in range(RESAMPLES):
        trained = np.bincount(draw.integers(0, repeats, repeats), minlength=repeats) / repeats
        sampled = np.bincount(draw.integers(0, tested, tested), minlength=tested) / tested
        accuracy = np.einsum("crn,r,n->c", values, trained, sampled, optimize=True)
        lines.append(_line(1 - accuracy, position, tested))
    return AccuracyCurve(lines[0], np.array(lines[1:]))


def _line(error: np.ndarray, position: np.ndarray, tested: int) -> np.ndarray:
    logs = np.log(np.maximum(error, 0.5 / tested))
    centred = position - position.mean()
    slope = min(0.0, float(centred @ logs / max(float(centred @ centred), 1e-12)))
    return np.array([logs.mean() - slope * position.mean(), slope])
