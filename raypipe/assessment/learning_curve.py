"""Fidelity as a function of the size of the seed set, and what doubling the seed set would give.

Kernel regression (`raypipe.extrapolators.gp.regression`, an expert of the default extrapolator) is
fitted on random parts of the seed set: an eighth, a quarter, half and all of it. It is assessed on
samples that no fit saw. Its constants are learned once, on the whole seed set: they are few, and
learning them again for every part would cost more than the fits. What is missing to a perfect
ranking is assumed to fall by the same factor with every doubling,

    1 - rho(n) = c n^-a ,   a >= 0

by least squares on log(1 - rho), as learning curves mostly do (Hestness et al. 2017, arXiv
1712.00409). The interval comes from resampling the assessed samples and fitting the law again. It
covers this source of error, but not the possibility that the law is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.assessment.rank_agreement import (
    MIN_SAMPLES,
    BootstrapInterval,
    spearman,
    spearman_of_resamples,
)
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.features import Scaler, Target
from raypipe.extrapolators.gp.regression import KernelRegression

DIVISORS = (8, 4, 2, 1)
"""The seed set is divided by these."""
MAX_REPEATS = 3
"""Maximum number of disjoint parts of one size that are fitted and averaged."""
CONSTANTS_ROWS = 300
"""Samples whose marginal likelihood the constants maximise: half as many as the extrapolator uses,
at a sixth of the time."""
MIN_SAMPLES_OF_PART = 40
"""Smaller parts are left out, because the curve has another shape there."""


@dataclass(frozen=True)
class LearningCurve:
    """Fidelity for several sizes of the seed set, and its extrapolation to twice the largest.

    Attributes
    ----------
    samples
        Numbers of scored samples in a fit.
    spearman, interval
        For each number, the rank correlation and its 95 % bootstrap interval.
    judged
        Number of samples on which it was assessed.
    doubled, doubled_interval
        Predicted rank correlation for twice the largest number of samples, and its interval.
    gain, gain_interval
        How much higher this is than the last point, and its interval.
    note
        Why there is no prediction; else empty.
    """

    samples: tuple[int, ...]
    spearman: tuple[float, ...]
    interval: tuple[BootstrapInterval, ...]
    judged: int
    doubled: float | None = None
    doubled_interval: BootstrapInterval | None = None
    gain: float | None = None
    gain_interval: BootstrapInterval | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the curve as JSON data."""
        points = zip(self.samples, self.spearman, self.interval, strict=True)
        return {
            "method": "kernel regression",
            "n_held": self.judged,
            "points": [
                {"samples": count, "spearman": rho, "spearman_interval": list(interval)}
                for count, rho, interval in points
            ],
            "doubled": {
                "samples": 2 * self.samples[-1] if self.samples else None,
                "spearman": self.doubled,
                "spearman_interval": list(self.doubled_interval) if self.doubled_interval else None,
                "gain": self.gain,
                "gain_interval": list(self.gain_interval) if self.gain_interval else None,
            },
            "note": self.note,
        }


def learning_curve(
    fit_nodes: Nodes, fit_score: np.ndarray, nodes: Nodes, measured: np.ndarray, seed: int
) -> LearningCurve:
    """Fit on parts of the scored samples and assess the fits on others.

    Parameters
    ----------
    fit_nodes, fit_score
        The seed set and its scores, float [n].
    nodes, measured
        The samples to assess on and their scores, float [m].
    seed
        Seed of the parts.

    Returns
    -------
    LearningCurve
        Has a note instead of points if there are too few samples or all scores are equal.
    """
    fit_score, measured = np.asarray(fit_score, np.float64), np.asarray(measured, np.float64)
    count = len(fit_score)
    sizes = [count // by for by in DIVISORS if count // by >= MIN_SAMPLES_OF_PART]
    if (
        len(sizes) < 3
        or len(measured) < MIN_SAMPLES
        or not np.ptp(fit_score)
        or not np.ptp(measured)
    ):
        note = (
            f"no learning curve: {count} measured samples and {len(measured)} to assess it on "
            "are too few, or all scores are equal"
        )
        return LearningCurve((), (), (), len(measured), note=note)
    rng = np.random.default_rng(seed)
    predictions = _predictions_of_parts(sizes, fit_nodes, fit_score, nodes, rng)
    correlation = {key: spearman(value, measured) for key, value in predictions.items()}
    resampled = spearman_of_resamples(predictions, measured, seed)
    points = np.array(
        [np.mean([correlation[key] or 0.0 for key in correlation if key[0] == n]) for n in sizes]
    )
    point_resamples = np.stack(
        [
            np.mean([np.nan_to_num(resampled[key]) for key in resampled if key[0] == n], 0)
            for n in sizes
        ]
    )  # [sizes, resamples]
    doubled = _extrapolated(sizes, points[:, None])[0]
    doubled_resamples = _extrapolated(sizes, point_resamples)
    return LearningCurve(
        samples=tuple(sizes),
        spearman=tuple(points.tolist()),
        interval=tuple(_percentile_interval(row) for row in point_resamples),
        judged=len(measured),
        doubled=float(doubled),
        doubled_interval=_percentile_interval(doubled_resamples),
        gain=float(doubled - points[-1]),
        gain_interval=_percentile_interval(doubled_resamples - point_resamples[-1]),
    )


def _predictions_of_parts(
    sizes: list[int],
    fit_nodes: Nodes,
    fit_score: np.ndarray,
    nodes: Nodes,
    rng: np.random.Generator,
) -> dict[tuple[int, int], np.ndarray]:
    """Predict `nodes` by fits on disjoint random parts, float64 [m] by (size, repeat)."""
    count = len(fit_score)
    order = rng.permutation(count)
    whole = KernelRegression(likelihood_rows=CONSTANTS_ROWS)
    whole_prediction = _fit_and_predict(whole, fit_nodes, fit_score, nodes, rng)
    predictions = {}
    for size in sizes:
        for repeat in range(min(MAX_REPEATS, count // size)):
            if size == count:
                predictions[size, repeat] = whole_prediction
                continue
            rows = order[repeat * size : (repeat + 1) * size]
            part = KernelRegression(constants=whole.learned_constants)
            predictions[size, repeat] = _fit_and_predict(
                part, fit_nodes.take(rows), fit_score[rows], nodes, rng
            )
    return predictions


def _fit_and_predict(
    kernel: KernelRegression,
    fit_nodes: Nodes,
    fit_score: np.ndarray,
    nodes: Nodes,
    rng: np.random.Generator,
) -> np.ndarray:
    """Fit a kernel regression to scores, float [n]; return its predictions, float64 [m]."""
    scaler, (target, z) = Scaler.fit(fit_nodes), Target.fit(fit_score)
    kernel.fit(scaler.embedding(fit_nodes), scaler.signals(fit_nodes), fit_nodes.label, z, rng)
    predicted = kernel.predict(scaler.embedding(nodes), scaler.signals(nodes), nodes.label)
    return target.restore(predicted).astype(np.float64)


def _extrapolated(sizes: list[int], rho: np.ndarray) -> np.ndarray:
    """Predict the correlations for twice the last size.

    The law gives the factor by which 1 - rho falls with one doubling. It is applied to the last
    point.

    Parameters
    ----------
    sizes
        Numbers of samples.
    rho
        Correlations at these, [sizes, resamples].

    Returns
    -------
    np.ndarray
        Predicted correlations, [resamples].
    """
    log_size = np.log2(sizes) - np.mean(np.log2(sizes))
    missing = np.log(np.clip(1 - rho, 1e-6, None))
    covariance = (log_size[:, None] * (missing - missing.mean(0))).sum(0)
    slope = np.minimum(covariance / np.square(log_size).sum(), 0)
    return 1 - (1 - rho[-1]) * np.exp(slope)


def _percentile_interval(values: np.ndarray) -> BootstrapInterval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
