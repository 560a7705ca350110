"""Map from expert predictions to scores, which a rehearsal learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from raypipe.extrapolators.features import NormalScores
from raypipe.extrapolators.proxy_signal import MONOTONE_NUMBERS, Monotone

RIDGE_ROWS = 10.0
"""Strength of the ridge penalty, in rows of data."""


@dataclass(frozen=True)
class Transfer:
    """Map from c inputs per sample to its score.

    Attributes
    ----------
    ranks
        Normal scores of the inputs.
    weights
        Weights of the ranked inputs, float64 [c]; their weighted sum orders the samples.
    mean
        Mean of the scores it was fitted on; the prediction if these have no order.
    rising
        Map from the weighted sum to the score; None if the scores have no order.
    """

    ranks: NormalScores
    weights: np.ndarray
    mean: float
    rising: Monotone | None

    @classmethod
    def fit(cls, inputs: np.ndarray, score: np.ndarray) -> Transfer:
        """Learn from inputs, float [n, c], and scores, float [n].

        Inputs that are not finite count as the middle rank.
        """
        score = np.asarray(score, np.float64)
        ranks = NormalScores.fit(inputs)
        x = ranks(inputs).astype(np.float64)
        y = NormalScores.fit(score[:, None])(score[:, None])[:, 0].astype(np.float64)
        weights = np.linalg.solve(x.T @ x + RIDGE_ROWS * np.eye(x.shape[1]), x.T @ y)
        return cls(ranks, weights, float(score.mean()), Monotone.fit(x @ weights, score))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Return scores, float64 [n]; each depends on its own row alone."""
        if self.rising is None:
            return np.full(len(inputs), self.mean)
        # summed by column: a matrix product can round a row differently depending on the other rows
        order = np.zeros(len(inputs))
        for column, weight in zip(self.ranks(inputs).T, self.weights):
            order += weight * column.astype(np.float64)
        return self.rising(order)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return everything fitted."""
        result = {"knots": self.ranks.knots, "weights": self.weights, "mean": np.array([self.mean])}
        if self.rising is not None:
            numbers = np.array([getattr(self.rising, name) for name in MONOTONE_NUMBERS])
            result |= {"x": self.rising.x, "y": self.rising.y, "numbers": numbers}
        return result

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Transfer:
        """Restore a map from its `tensors`; raises KeyError if one is missing."""
        rising = None
        if "x" in tensors:
            rising = Monotone(
                np.array(tensors["x"]),
                np.array(tensors["y"]),
                *np.array(tensors["numbers"]).tolist(),
            )
        return cls(
            NormalScores(np.array(tensors["knots"])),
            np.array(tensors["weights"]),
            float(tensors["mean"][0]),
            rising,
        )
