"""Standardisation of embeddings, proxy statistics and scores for the default extrapolator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Nodes

KNOTS = 257
"""Quantiles that describe the distribution of a signal."""
MAX_EMBEDDING = 100.0
"""Standardised embedding values are clipped to plus or minus this."""
MAX_SCORE_RANGES = 8.0
"""Scores farther than this many interquartile ranges from the median are clipped before a fit."""

END_ZONE = 0.01
"""Share of the range at each of its ends that takes up predictions beyond the range."""
EXTENSIONS = (0.0, 0.05, 0.1, 0.2)
"""By how much an end of the range can move out, in units of the range."""
MIN_BEYOND = 3
"""With fewer held-out predictions beyond an end of the range, it stays."""


@dataclass(frozen=True)
class NormalScores:
    """Maps numbers to the normal scores of their ranks among those of the fit.

    The result is bounded, whatever values come later.

    Attributes
    ----------
    knots
        Quantiles of each column, float32 [s, 257].
    """

    knots: np.ndarray

    @classmethod
    def fit(cls, columns: np.ndarray) -> NormalScores:
        """Learn the quantiles of each column, float [n, s], from its finite values."""
        knots = [
            np.quantile(
                column[np.isfinite(column)] if np.isfinite(column).any() else [0.0],
                np.linspace(0, 1, KNOTS),
            )
            for column in columns.T
        ]
        return cls(np.array(knots, np.float32).reshape(len(knots), KNOTS))

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """Return the normal scores, float32 [n, s]; 0, the middle, for values that are not finite.

        Raises
        ------
        RaypipeError
            The number of columns differs from that of the fit.
        """
        if columns.shape[1] != len(self.knots):
            raise RaypipeError(
                f"{columns.shape[1]} signals for each sample, but the fit had {len(self.knots)}"
            )
        result = np.zeros(columns.shape, np.float32)
        for column, (values, knots) in enumerate(zip(columns.T, self.knots)):
            finite = np.isfinite(values)
            # mean of both sides, so that values tied over several knots get their middle rank
            low, high = (
                np.searchsorted(knots, values[finite], side) / KNOTS for side in ("left", "right")
            )
            interpolated = np.interp(values[finite], knots, np.linspace(0, 1, KNOTS))
            rank = np.where(high - low > 1.5 / KNOTS, (low + high) / 2, interpolated)
            result[finite, column] = ndtri(0.5 + (rank - 0.5) * (1 - 1 / KNOTS))
        return result


@dataclass(frozen=True)
class Scaler:
    """Scales embeddings and signals to unit spread on the seed set.

    Attributes
    ----------
    mean, spread
        Mean and standard deviation of the embedding, float32 [d].
    ranks
        Normal scores of the signals.

    Notes
    -----
    Losses of samples that the proxy was not trained on reach far beyond those of the seed set.
    Ranks are bounded, so these losses cannot drive a prediction beyond anything seen in the fit.
    """

    mean: np.ndarray
    spread: np.ndarray
    ranks: NormalScores

    @classmethod
    def fit(cls, seed: Nodes) -> Scaler:
        """Learn means and spreads from the seed set."""
        spread = seed.embedding.std(0, dtype=np.float64)
        # the spread of a constant feature is rounding error
        rounding = 1e-6 * max(1e-12, float(np.abs(seed.embedding).max()))
        spread[spread < rounding] = 1
        mean = seed.embedding.mean(0, dtype=np.float64)
        return cls(
            mean.astype(np.float32), spread.astype(np.float32), NormalScores.fit(seed.signals)
        )

    def embedding(self, nodes: Nodes) -> np.ndarray:
        """Return standardised embeddings, float32 [n, d], within +-100.

        The bound keeps a damaged embedding from overflowing what is computed from it.
        """
        standardised = (nodes.embedding.astype(np.float64) - self.mean) / self.spread
        return np.clip(standardised, -MAX_EMBEDDING, MAX_EMBEDDING).astype(np.float32)

    def layer(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewrite a linear layer so that it takes the output of `embedding`.

        `weight` is float [c, d], `bias` float [c]; the result is float64.
        """
        weight = weight.astype(np.float64)
        return weight * self.spread, bias + weight @ self.mean.astype(np.float64)

    def signals(self, nodes: Nodes) -> np.ndarray:
        """Return normal scores of the signals, float32 [n, s]."""
        return self.ranks(nodes.signals)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return everything fitted."""
        return {"mean": self.mean, "spread": self.spread, "knots": self.ranks.knots}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Scaler:
        """Restore a scaler from its `tensors`."""
        return cls(tensors["mean"], tensors["spread"], NormalScores(tensors["knots"]))


@dataclass(frozen=True)
class Target:
    """Standardises scores: z = (score - mean) / spread.

    This is affine, except for outliers, which are clipped.
    """

    mean: float
    spread: float

    @classmethod
    def fit(cls, score: np.ndarray) -> tuple[Target, np.ndarray]:
        """Return the target, whose spread is 0 if the scores are constant, and z, float64 [n]."""
        low, middle, high = np.quantile(score, [0.25, 0.5, 0.75])
        reach = MAX_SCORE_RANGES * (high - low)
        if reach > 0:
            score = np.clip(score, middle - reach, middle + reach)
        mean, spread = float(score.mean()), float(score.std())
        if spread <= 1e-9 * abs(mean):  # at most the rounding error of equal float32 scores
            return cls(mean, 0.0), np.zeros_like(score)
        return cls(mean, spread), (score - mean) / spread

    def restore(self, z: np.ndarray) -> np.ndarray:
        """Return the scores of z, float32 [n]."""
        return self.unscaled(z).astype(np.float32)

    def unscaled(self, z: np.ndarray) -> np.ndarray:
        """Return the scores of z, float64 [n]."""
        return z.astype(np.float64) * self.spread + self.mean


@dataclass(frozen=True)
class Bounds:
    """The range that predictions cannot leave.

    Attributes
    ----------
    low, high
        Ends of the range. Infinite ends leave predictions as they are: extrapolators that were
        saved before version 0.3.0 have no range.

    Notes
    -----
    A prediction beyond the range of all measured scores is an extrapolation that no sample
    supports. Cutting it off at the end of the range would tie all such samples. So the last
    hundredth of the range on each side takes them up, in their order.
    """

    low: float = -np.inf
    high: float = np.inf

    @classmethod
    def fit(
        cls,
        score: np.ndarray,
        held: np.ndarray | None = None,
        predicted: np.ndarray | None = None,
    ) -> Bounds:
        """Return the range of the scores, extended where held-out predictions justify it.

        An end moves out by the step in `EXTENSIONS` that gives the least squared error of the
        held-out predictions, if at least three of them lie beyond the range of the other samples.

        Parameters
        ----------
        score
            Measured scores, float [n].
        held
            Samples that were held out, int64 [m].
        predicted
            Their predictions by a fit on the others, float [m].
        """
        low, high = float(np.min(score)), float(np.max(score))
        if held is None or predicted is None:
            return cls(low, high)
        rest, measured = np.delete(score, held), score[held]
        finite = np.isfinite(predicted)
        predicted, measured = predicted[finite], measured[finite]
        if not len(rest) or not len(predicted):
            return cls(low, high)
        reach = float(np.ptp(rest))
        below = _extension(-rest.min(), -predicted, -measured, reach)
        above = _extension(rest.max(), predicted, measured, reach)
        return cls(low - below * (high - low), high + above * (high - low))

    def __call__(self, predicted: np.ndarray) -> np.ndarray:
        """Return predictions within the range, in the same order, float32 [n]."""
        zone = END_ZONE * (self.high - self.low)
        if not np.isfinite(zone):
            return predicted.astype(np.float32)
        if zone <= 0:
            return np.full(predicted.shape, self.low, np.float32)
        value = predicted.astype(np.float64)
        for end, sign in ((self.high, 1.0), (self.low, -1.0)):
            beyond = np.maximum(sign * (value - end) / zone + 1, 0)
            value = np.where(beyond > 0, end - sign * zone / (1 + beyond), value)
        # rounding to float32 must not leave the range either
        low = np.nextafter(np.float32(self.low), np.float32(np.inf))
        high = np.nextafter(np.float32(self.high), np.float32(-np.inf))
        return np.clip(value, float(low), float(high)).astype(np.float32)

    def state(self) -> list[float]:
        """Return both ends as JSON data."""
        return [self.low, self.high]

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Bounds:
        """Restore the range from the metadata of an extrapolator; without one it is infinite."""
        return cls(*(float(end) for end in meta["bounds"])) if "bounds" in meta else cls()


def _extension(end: float, predicted: np.ndarray, measured: np.ndarray, reach: float) -> float:
    """Return by how much held-out samples justify moving out the upper end of the range."""
    if (predicted > end).sum() < MIN_BEYOND:
        return 0.0
    errors = [
        np.square(np.minimum(predicted, end + extension * reach) - measured).sum()
        for extension in EXTENSIONS
    ]
    return EXTENSIONS[int(np.argmin(errors))]
