"""How much more accurate models on keep-lists are than models on random lists, with certainty.

Two things are random: the trainings (weights, order, draw of the lists) and the test samples. All
models are tested on the same samples, so more trainings do not average the second away. The error
of an estimate has a part for each, as with two-way clustering (Cameron, Gelbach & Miller 2011):

    V = V_trainings + V_test - V_both,    at least each of the first two

An estimate is a weighted sum of the mean differences in *cells*, such as a keep fraction at a size
of the set, each with several paired trainings. It is a linear function of columns of a design.
Where the cells scatter about that function by more than trainings explain, the scatter is
V_trainings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
"""Of intervals (two-sided) and of decisions (one-sided)."""
BETTER, WORSE, NO_EVIDENCE = "better", "worse", "no evidence"
"""What a gain shows: above 0 with certainty, below 0 with certainty, neither."""


@dataclass(frozen=True)
class Gain:
    """A difference in accuracy to random lists.

    Attributes
    ----------
    mean
        The estimate, as a share of the test samples.
    error
        Its standard error.
    freedom
        Degrees of freedom of Student's t.
    choices
        Number of lists from which the best is chosen; `lower` and `upper` are corrected for it.
    """

    mean: float
    error: float
    freedom: float
    choices: int = 1

    @property
    def interval(self) -> tuple[float, float]:
        """The two-sided 95 % interval, without a correction."""
        margin = _student((1 + CONFIDENCE) / 2, self.freedom) * self.error
        return self.mean - margin, self.mean + margin

    @property
    def lower(self) -> float:
        """The end of the one-sided interval, 95 % for all choices together (Bonferroni)."""
        return self.mean - self._corrected_margin

    @property
    def upper(self) -> float:
        """The other end of such an interval."""
        return self.mean + self._corrected_margin

    @property
    def _corrected_margin(self) -> float:
        level = 1 - (1 - CONFIDENCE) / self.choices
        return _student(level, self.freedom) * self.error

    @property
    def verdict(self) -> str:
        """What the gain shows, corrected for the number of choices."""
        return BETTER if self.lower > 0 else WORSE if self.upper < 0 else NO_EVIDENCE

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        low, high = self.interval
        return {
            "mean": self.mean,
            "low": low,
            "high": high,
            "lower": self.lower,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, eq=False)
class GainModel:
    """Gains of one kind of list as a linear function, with the covariance of its coefficients.

    Attributes
    ----------
    coefficients
        float64 [p].
    trainings, test, both
        Parts of the covariance, float64 [p, p].
    freedom_trainings, freedom_test
        Degrees of freedom of the first two.
    choices
        See `Gain`.
    """

    coefficients: np.ndarray
    trainings: np.ndarray
    test: np.ndarray
    both: np.ndarray
    freedom_trainings: float
    freedom_test: float
    choices: int

    def at(self, *row: float) -> Gain:
        """Return the gain at a row of the design."""
        x = np.array(row, np.float64)
        trainings, test, both = (
            float(x @ part @ x) for part in (self.trainings, self.test, self.both)
        )
        variance = max(trainings, test, trainings + test - both)
        # Satterthwaite
        spread = trainings**2 / self.freedom_trainings + test**2 / self.freedom_test
        freedom = (trainings + test) ** 2 / spread if spread else self.freedom_trainings
        mean = float(x @ self.coefficients)
        return Gain(mean, math.sqrt(variance), max(1.0, freedom), self.choices)


def fit_gains(difference: np.ndarray, design: np.ndarray, choices: int = 0) -> list[GainModel]:
    """Fit the gains of several kinds of lists, by least squares over the means of the cells.

    Parameters
    ----------
    difference
        Right or wrong (1 or 0) on the list, minus the same on the random list that is paired with
        it: [kinds, cells, repeats, test samples].
    design
        float64 [cells, p], such as a column of ones for a mean.
    choices
        Number of choices to correct for; 0: the number of kinds.

    Returns
    -------
    list of GainModel
        One per kind. Kinds share the spread of trainings within cells.

    Raises
    ------
    ValueError
        With fewer than two repeats or test samples.
    """
    kinds, cells, repeats, tested = difference.shape
    parameters = design.shape[1]
    if repeats < 2 or tested < 2:
        raise ValueError("gains need at least two repeats of each training, and two test samples")
    values = difference.astype(np.float64)
    by_training, by_sample = values.mean(3), values.mean(2)  # [kinds, cells, repeats or samples]
    cell = by_training.mean(2)
    inverse = np.linalg.inv(design.T @ design)
    solve = inverse @ design.T  # [p, cells]
    within = by_training.var(2, ddof=1).mean() / repeats
    residual = values - by_training[..., None] - by_sample[:, :, None] + cell[:, :, None, None]
    interaction = (residual**2).sum((2, 3)) / ((repeats - 1) * max(1, tested - 1))
    models = []
    for kind in range(kinds):
        coefficients = solve @ cell[kind]
        spread, freedom = within, float(cells * (repeats - 1))
        if cells > parameters:
            lack = ((cell[kind] - design @ coefficients) ** 2).sum() / (cells - parameters)
            if lack > spread:
                spread, freedom = lack, float(cells - parameters)
        of_samples = solve @ by_sample[kind]  # [p, samples]
        models.append(
            GainModel(
                coefficients,
                spread * inverse,
                np.cov(of_samples).reshape(parameters, parameters) / tested,
                (solve * interaction[kind]) @ solve.T / (tested * repeats),
                freedom,
                float(max(1, tested - 1)),
                choices or kinds,
            )
        )
    return models


def best_choice(gains: Mapping[str, Gain]) -> str | None:
    """Return the list that is better than random with the most certainty; None if none is."""
    better = {name: gain for name, gain in gains.items() if gain.verdict == BETTER}
    return max(better, key=lambda name: (better[name].lower, name), default=None)


def _student(level: float, freedom: float) -> float:
    """Return a quantile of Student's t."""
    from scipy.special import stdtrit  # slow to import, and `raypipe plan` imports this module

    return float(stdtrit(freedom, level))
