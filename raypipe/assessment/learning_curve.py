"""Fidelity against the size of the seed set, and what doubling it would give.

Kernel regression (`raypipe.extrapolators.gp.regression`, a part of the default extrapolator) is fitted on random parts of the seed set, an
eighth, a quarter, half and all of it, and judged on samples that no fit saw. Its constants are those of the whole seed set: they
are nine numbers, and learning them anew for every part would cost more than the fits. What is missing to a perfect ranking is
taken to fall by the same factor with every doubling,

    1 - rho(n) = c n^-a ,   a >= 0

by least squares on log(1 - rho), as learning curves mostly do (Hestness et al. 2017, arXiv 1712.00409). The range
resamples the samples judged on, and fits anew: it holds this source of error, and not that the law may be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.assessment.rank_agreement import MIN_SAMPLES, Interval, spearman, spearman_of_resamples
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.features import Scaler, Target
from raypipe.extrapolators.gp.regression import KernelRegression

PARTS = (8, 4, 2, 1)
"""The seed set is divided by these."""
REPEATS = 3
"""Most disjoint parts of one size that are fitted and averaged over."""
CONSTANTS_ROWS = 300
"""Samples whose likelihood the constants maximise: half of what the extrapolator takes, at a sixth of the time."""
FEWEST_IN_PART = 40
"""Scored samples below which a part is left out: the curve has another shape there."""


@dataclass(frozen=True)
class LearningCurve:
    """spearman[i] of a fit on samples[i] scored samples, judged on `judged` others, with 95 % bootstrap intervals.

    doubled, gain  what is predicted for twice the largest number: the correlation, and by how much it is higher; with ranges
    note           why there is no prediction, where there is none
    """

    samples: tuple[int, ...]
    spearman: tuple[float, ...]
    interval: tuple[Interval, ...]
    judged: int
    doubled: float | None = None
    doubled_interval: Interval | None = None
    gain: float | None = None
    gain_interval: Interval | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Itself as JSON."""
        points = zip(self.samples, self.spearman, self.interval, strict=True)
        return {
            "method": "kernel regression",
            "n_held": self.judged,
            "points": [
                {"samples": count, "spearman": rho, "spearman_interval": list(between)}
                for count, rho, between in points
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
    known: Nodes, score: np.ndarray, nodes: Nodes, measured: np.ndarray, seed: int
) -> LearningCurve:
    """Fit on parts of `known`, with scores float [n], judge on `nodes`, with measured scores float [m]; `seed` is that of the parts.

    Where something is too few or constant, there are no points but a note.
    """
    score, measured = np.asarray(score, np.float64), np.asarray(measured, np.float64)
    count = len(score)
    sizes = [count // part for part in PARTS if count // part >= FEWEST_IN_PART]
    if len(sizes) < 3 or len(measured) < MIN_SAMPLES or not np.ptp(score) or not np.ptp(measured):
        note = f"no learning curve from {count} measured samples and {len(measured)} to judge it on: too few, or all scores equal"
        return LearningCurve((), (), (), len(measured), note=note)
    rng = np.random.default_rng(seed)
    order, kernel, predictions = rng.permutation(count), _FewConstants(), {}
    whole = _predict(kernel, known, score, nodes, rng)
    for size in sizes:
        for repeat in range(min(REPEATS, count // size)):
            rows = order[repeat * size : (repeat + 1) * size]
            again = _SameConstants(kernel)
            predictions[size, repeat] = (
                whole
                if size == count
                else _predict(again, known.take(rows), score[rows], nodes, rng)
            )
    here = {key: spearman(value, measured) for key, value in predictions.items()}
    drawn = spearman_of_resamples(predictions, measured, seed)
    middle = np.array(
        [np.mean([here[key] or 0.0 for key in here if key[0] == size]) for size in sizes]
    )
    spread = np.stack(
        [
            np.mean([np.nan_to_num(drawn[key]) for key in drawn if key[0] == size], 0)
            for size in sizes
        ]
    )
    doubled, doubles = _extrapolated(sizes, middle[:, None])[0], _extrapolated(sizes, spread)
    return LearningCurve(
        tuple(sizes),
        tuple(middle.tolist()),
        tuple(_range(row) for row in spread),
        len(measured),
        float(doubled),
        _range(doubles),
        float(doubled - middle[-1]),
        _range(doubles - spread[-1]),
    )


def _extrapolated(sizes: list[int], rho: np.ndarray) -> np.ndarray:
    """The correlations predicted for twice the last size, from those at `sizes`, [sizes, resamples] -> [resamples].

    The law gives the factor by which 1 - rho falls with one doubling; it is applied to the last point.
    """
    at = np.log2(sizes) - np.mean(np.log2(sizes))
    missing = np.log(np.clip(1 - rho, 1e-6, None))
    slope = np.minimum((at[:, None] * (missing - missing.mean(0))).sum(0) / np.square(at).sum(), 0)
    return 1 - (1 - rho[-1]) * np.exp(slope)


def _predict(
    kernel: KernelRegression,
    known: Nodes,
    score: np.ndarray,
    nodes: Nodes,
    rng: np.random.Generator,
) -> np.ndarray:
    scaler, (target, z) = Scaler.fit(known), Target.fit(score)
    kernel.fit(scaler.embedding(known), scaler.signals(known), known.label, z, rng)
    return target.restore(
        kernel.predict(scaler.embedding(nodes), scaler.signals(nodes), nodes.label)
    ).astype(np.float64)


class _FewConstants(KernelRegression):
    """Kernel regression that learns its constants from fewer samples."""

    def _learn_constants(self, points: list[Any], z: Any) -> None:
        super()._learn_constants([part[:CONSTANTS_ROWS] for part in points], z[:CONSTANTS_ROWS])


class _SameConstants(KernelRegression):
    """Kernel regression with the constants of one that is fitted."""

    def __init__(self, fitted: KernelRegression) -> None:
        self._given = fitted._units, fitted._constants

    def _learn_constants(self, points: list[Any], z: Any) -> None:
        self._units, self._constants = self._given


def _range(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
