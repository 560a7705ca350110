"""Samples and scores in the units the default extrapolator works in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Nodes

KNOTS = 257
"""Quantiles that describe the distribution of a signal."""
FARTHEST = 100.0
WILD = 8.0
"""Scores further than this many interquartile ranges from the median are pulled in before a fit."""


@dataclass(frozen=True)
class NormalScores:
    """Brings numbers to normal scores of their ranks, as seen in a fit: bounded, whatever comes later.

    knots  float32 [s, 257], quantiles of each column
    """

    knots: np.ndarray

    @classmethod
    def fit(cls, columns: np.ndarray) -> NormalScores:
        """From float [n, s]; what is not finite says nothing."""
        knots = [
            np.quantile(
                column[np.isfinite(column)] if np.isfinite(column).any() else [0.0],
                np.linspace(0, 1, KNOTS),
            )
            for column in columns.T
        ]
        return cls(np.array(knots, np.float32).reshape(len(knots), KNOTS))

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """float32 [n, s]; 0, the middle, where a number is not finite. Raises RaypipeError for another number of columns."""
        if columns.shape[1] != len(self.knots):
            raise RaypipeError(
                f"{columns.shape[1]} signals for each sample, but the fit had {len(self.knots)}"
            )
        result = np.zeros(columns.shape, np.float32)
        for column, (values, knots) in enumerate(zip(columns.T, self.knots)):
            good = np.isfinite(values)
            # mean of both sides, so that values tied over several knots get their middle rank
            low, high = (
                np.searchsorted(knots, values[good], side) / KNOTS for side in ("left", "right")
            )
            inside = np.interp(values[good], knots, np.linspace(0, 1, KNOTS))
            rank = np.where(high - low > 1.5 / KNOTS, (low + high) / 2, inside)
            result[good, column] = ndtri(0.5 + (rank - 0.5) * (1 - 1 / KNOTS))
        return result


@dataclass(frozen=True)
class Scaler:
    """Brings embeddings and signals to unit spread, as seen on the seed set.

    mean, spread  float32 [d], of the embedding
    ranks         of the signals

    Losses of samples the proxy was not trained on reach far beyond those of the seed set; a rank is bounded, so that they cannot drive
    a prediction beyond anything seen in the fit.
    """

    mean: np.ndarray
    spread: np.ndarray
    ranks: NormalScores

    @classmethod
    def fit(cls, seed: Nodes) -> Scaler:
        spread = seed.embedding.std(0, dtype=np.float64)
        spread[spread < 1e-6 * max(1e-12, float(np.abs(seed.embedding).max()))] = (
            1  # a constant feature is rounding, not signal
        )
        mean = seed.embedding.mean(0, dtype=np.float64)
        return cls(
            mean.astype(np.float32), spread.astype(np.float32), NormalScores.fit(seed.signals)
        )

    def embedding(self, nodes: Nodes) -> np.ndarray:
        """float32 [n, d], values within +-100: a damaged embedding must not overflow what is computed from it."""
        return np.clip(
            (nodes.embedding.astype(np.float64) - self.mean) / self.spread, -FARTHEST, FARTHEST
        ).astype(np.float32)

    def layer(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A linear layer, float [c, d] and [c], as one that takes what `embedding` gives: float64."""
        weight = weight.astype(np.float64)
        return weight * self.spread, bias + weight @ self.mean.astype(np.float64)

    def signals(self, nodes: Nodes) -> np.ndarray:
        """float32 [n, s]; see NormalScores."""
        return self.ranks(nodes.signals)

    def tensors(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "spread": self.spread, "knots": self.ranks.knots}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Scaler:
        return cls(tensors["mean"], tensors["spread"], NormalScores(tensors["knots"]))


@dataclass(frozen=True)
class Target:
    """Scores in standard units: z = (score - mean) / spread, a pure affine change but for wild values, which are pulled in."""

    mean: float
    spread: float

    @classmethod
    def fit(cls, score: np.ndarray) -> tuple[Target, np.ndarray]:
        """The change of units, spread 0 when the scores are constant, and z, float64 [n]."""
        low, middle, high = np.quantile(score, [0.25, 0.5, 0.75])
        reach = WILD * (high - low)
        if reach > 0:
            score = np.clip(score, middle - reach, middle + reach)
        mean, spread = float(score.mean()), float(score.std())
        if spread <= 1e-9 * abs(mean):  # no more than the rounding of equal float32 scores
            return cls(mean, 0.0), np.zeros_like(score)
        return cls(mean, spread), (score - mean) / spread

    def restore(self, z: np.ndarray) -> np.ndarray:
        """Scores, float32 [n]."""
        return (z * self.spread + self.mean).astype(np.float32)
