"""The map from expert predictions to scores that a rehearsal learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raypipe.extrapolators.features import NormalScores
from raypipe.extrapolators.proxy_signal import MONOTONE_NUMBERS, Monotone

if TYPE_CHECKING:
    pass


RIDGE_ROWS = 10.0
"""Rows' worth of pull of the weights to 0."""


@dataclass(frozen=True)
class Transfer:
    """The map from inputs, float [n, c], to scores.

    ranks    of the inputs
    weights  float64 [c]
    mean     of the scores that it was learned on, where there is no order in them
    rising   the map of the order to the score; None where there is none
    """

    ranks: NormalScores
    weights: np.ndarray
    mean: float
    rising: Monotone | None

    @classmethod
    def fit(cls, inputs: np.ndarray, score: np.ndarray) -> Transfer:
        """From float [n, c] and float [n]; an input that is not finite says nothing."""
        score = np.asarray(score, np.float64)
        ranks = NormalScores.fit(inputs)
        x = ranks(inputs).astype(np.float64)
        y = NormalScores.fit(score[:, None])(score[:, None])[:, 0].astype(np.float64)
        weights = np.linalg.solve(x.T @ x + RIDGE_ROWS * np.eye(x.shape[1]), x.T @ y)
        return cls(ranks, weights, float(score.mean()), Monotone.fit(x @ weights, score))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Scores, float64 [n]; each depends on its own row alone."""
        if self.rising is None:
            return np.full(len(inputs), self.mean)
        # summed column by column: a matrix product may round a row differently beside other rows
        order = np.zeros(len(inputs))
        for column, weight in zip(self.ranks(inputs).T, self.weights):
            order += weight * column.astype(np.float64)
        return self.rising(order)

    def tensors(self) -> dict[str, np.ndarray]:
        result = {"knots": self.ranks.knots, "weights": self.weights, "mean": np.array([self.mean])}
        if self.rising is not None:
            numbers = np.array([getattr(self.rising, name) for name in MONOTONE_NUMBERS])
            result |= {"x": self.rising.x, "y": self.rising.y, "numbers": numbers}
        return result

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Transfer:
        """Restore what `tensors` gave. Raises KeyError for one that is missing."""
        rising = None
        if "x" in tensors:
            rising = Monotone(
                np.array(tensors["x"]),
                np.array(tensors["y"]),
                *np.array(tensors["numbers"]).tolist(),
            )
        mean = float(tensors["mean"][0])
        return cls(
            NormalScores(np.array(tensors["knots"])), np.array(tensors["weights"]), mean, rising
        )
