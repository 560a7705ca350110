"""Calibrated intervals around predicted scores that also hold for extreme and for far samples.

The half-width of the interval of a sample x of class y is

    h(x) = q * f(x) * sigma(x) ,    sigma(x) = g_y (c_0 + sum_j c_j d_j(x) + c_p |p(x) - m|) ,

with c >= 0. d_j are the doubts of the extrapolator: the distance to the scored samples in the
embedding, in the proxy statistics and in the proxy's error, and the disagreement of the experts. p
is the prediction, m the median prediction.

sigma predicts the absolute residual. c comes from the residuals of held-out samples by non-negative
least squares, with a penalty worth twenty samples that pulls all terms towards equal shares. So an
interval can only grow with a doubt. g_y is the mean of |residual| / sigma in class y relative to
that of all classes, shrunk towards 1 as if by ten samples. c and g are fitted in turns, because
classes differ in their doubts and predictions.

f corrects sigma in two zones, the most extreme and the farthest tenth of the samples, so that both
reach the confidence (Mondrian conformal prediction: Vovk et al. 2005, section 4.5): in each zone
the quantile of |residual| / sigma is brought to that of all samples. The zones overlap, so this too
is done in turns. Residuals are those to a sigma that was fitted without the sample's fifth of the
samples (cross-conformal prediction: Vovk 2015).

q is the split conformal quantile of |residual| / (f sigma) (Papadopoulos et al. 2008; Lei et al.
2018, section 5.2).

Held-out samples of the seed set are many, but one proxy that is trained on all of them makes them
not exchangeable with the other samples. Audit samples are, but there are few of them. Both sets
count equally in sigma and f. From 40 audit samples on, q comes from them alone, otherwise from all
samples. With cross-fitting all measured samples are exchangeable and count alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from raypipe.errors import RaypipeError

PRIOR_SAMPLES = 20.0
"""Weight, in samples, of the penalty on c."""
PRIOR_OF_CLASS = 10.0
"""Weight, in samples, of the ratio 1 in g."""
PRIOR_OF_ZONE = 5.0
"""Weight, in samples, of the factor 1 in f."""
MIN_AUDIT = 40
"""With at least this many audit samples, these alone decide the width of all intervals."""
ZONE = 0.1
"""Share of the samples in a zone."""
TURNS = 3
"""How often c and g, and the factors of the two zones, are fitted in turns."""
FOLDS = 5
"""Parts of the samples that are left out of a calibration in turn."""


@dataclass(frozen=True)
class Calibration:
    """Samples that were held out of the fit, for `Intervals.fit`.

    Attributes
    ----------
    residual
        Measured minus predicted scores, float [n].
    predicted
        Predicted scores, float [n].
    doubt
        Doubts, float [n, d], at least 0; the first is the distance in the embedding.
    label
        Classes, int [n]; -1 without.
    """

    residual: np.ndarray
    predicted: np.ndarray
    doubt: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.residual)
        if self.doubt.ndim != 2 or {len(self.predicted), len(self.doubt), len(self.label)} != {n}:
            raise RaypipeError(f"{n} residuals do not match the other values of their samples")
        for values in (self.residual, self.predicted, self.doubt):
            if not np.isfinite(values).all():
                raise RaypipeError("intervals need finite residuals, predictions and doubts")
        if (self.doubt < 0).any():
            raise RaypipeError("intervals need doubts of at least 0")

    def __len__(self) -> int:
        return len(self.residual)

    def take(self, rows: np.ndarray) -> Calibration:
        """Return the samples at `rows`."""
        return Calibration(
            self.residual[rows], self.predicted[rows], self.doubt[rows], self.label[rows]
        )

    @staticmethod
    def concat(parts: Sequence[Calibration]) -> Calibration:
        """Join several."""
        return Calibration(
            np.concatenate([part.residual for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            np.concatenate([part.doubt for part in parts]),
            np.concatenate([part.label for part in parts]),
        )


@dataclass(frozen=True)
class Intervals:
    """Half-widths of prediction intervals.

    Attributes
    ----------
    quantile
        q; None if there are too few samples for this confidence.
    confidence
        Share of samples whose score should lie in its interval.
    count, audit_count
        Number of held-out samples of the seed set and of audit samples in the fit.
    scale
        c_0, the c_j of the doubts, and c_p.
    middle
        m, the median prediction.
    zone_from, zone_factor
        Where the zone of extreme and that of far samples begin, and f in them.
    of_class
        g by class.
    """

    quantile: float | None
    confidence: float
    count: int
    audit_count: int
    scale: tuple[float, ...]
    middle: float
    zone_from: tuple[float, float] = (math.inf, math.inf)
    zone_factor: tuple[float, float] = (1.0, 1.0)
    of_class: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, held_out: Calibration, confidence: float, audit: Calibration | None = None
    ) -> Intervals:
        """Calibrate on held-out samples of the seed set and, where there are any, audit samples.

        Raises
        ------
        RaypipeError
            The two sets have different doubts.
        """
        count, audits = len(held_out), len(audit) if audit is not None else 0
        parts = [held_out, *([audit] if audit is not None else [])]
        if len({part.doubt.shape[1] for part in parts}) > 1:
            raise RaypipeError("held-out and audit samples have different numbers of doubts")
        data = Calibration.concat(parts)
        weight = np.ones(len(data))
        if audits:
            weight[count:] = max(1.0, count / audits)
        if not len(data) or not np.abs(data.residual).max():
            empty = (1.0,) + (0.0,) * (data.doubt.shape[1] + 1)
            quantile = _quantile(np.abs(data.residual), confidence)
            return cls(quantile, confidence, count, audits, empty, 0.0)
        ratio = _cross_fitted_ratios(data, weight)
        corrected = _fit_sigma(data, weight)._corrected(data, ratio, weight, confidence)
        ratio /= corrected._zone_factors(data.predicted, data.doubt)
        quantile = _quantile(ratio[count if audits >= MIN_AUDIT else 0 :], confidence)
        if quantile is not None and not math.isfinite(quantile):
            quantile = None
        return replace(
            corrected, quantile=quantile, confidence=confidence, count=count, audit_count=audits
        )

    def around(self, predicted: np.ndarray, doubt: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Return half the width of each interval in units of the score, float32 [n].

        It is infinite where `quantile` is None.
        """
        if self.quantile is None:
            return np.full(len(predicted), np.inf, np.float32)
        relative = self._sigma(predicted, doubt, label) * self._zone_factors(predicted, doubt)
        return (self.quantile * relative).astype(np.float32)

    def state(self) -> dict[str, Any]:
        """Return the intervals as JSON data."""
        ends = [end if math.isfinite(end) else None for end in self.zone_from]
        return {
            **vars(self),
            "scale": list(self.scale),
            "zone_from": ends,
            "zone_factor": list(self.zone_factor),
            "of_class": {str(label): value for label, value in self.of_class.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Intervals:
        """Restore intervals from their `state`."""
        extreme, far = (math.inf if end is None else end for end in state["zone_from"])
        return cls(
            **{
                **state,
                "scale": tuple(state["scale"]),
                "zone_from": (extreme, far),
                "zone_factor": tuple(state["zone_factor"]),
                "of_class": {int(label): value for label, value in state["of_class"].items()},
            }
        )

    def _corrected(
        self, data: Calibration, ratio: np.ndarray, weight: np.ndarray, confidence: float
    ) -> Intervals:
        """Return the intervals with f, from the ratios |residual| / sigma of all samples."""
        values = _zone_values(data.predicted, data.doubt, self.middle)
        starts = [float(np.quantile(value, 1 - ZONE)) for value in values]
        zones = [value > start for value, start in zip(values, starts, strict=True)]
        factors = [1.0, 1.0]
        for _ in range(TURNS):
            for number, zone in enumerate(zones):
                other = np.where(zones[1 - number], factors[1 - number], 1.0)
                own = np.where(zone, factors[number], 1.0)
                overall = _weighted_quantile(ratio / (other * own), weight, confidence)
                factors[number] = _ratio_to(
                    overall, (ratio / other)[zone], weight[zone], confidence
                )
        return replace(self, zone_from=(starts[0], starts[1]), zone_factor=(factors[0], factors[1]))

    def _sigma(self, predicted: np.ndarray, doubt: np.ndarray, label: np.ndarray) -> np.ndarray:
        # a matrix product can round a row differently depending on the other rows
        result = (_columns(predicted, doubt, self.middle) * np.array(self.scale)).sum(1)
        return result * _by_label(self.of_class, label)

    def _zone_factors(self, predicted: np.ndarray, doubt: np.ndarray) -> np.ndarray:
        """Return f, float64 [n]."""
        result = np.ones(len(predicted))
        values = _zone_values(predicted, doubt, self.middle)
        for value, start, factor in zip(values, self.zone_from, self.zone_factor, strict=True):
            result[value > start] *= factor
        return result


def cross_coverage(
    held_out: Calibration, confidence: float, seed: int, audit: Calibration | None = None
) -> np.ndarray | None:
    """Return whether each sample lies in its interval, calibrated without it.

    The samples are those of `audit`, or of `held_out` without one; bool [n]. Each fifth is left out
    of the calibration in turn. None if there are too few samples for finite intervals.
    """
    data = held_out if audit is None else audit
    inside = np.zeros(len(data), bool)
    order = np.random.default_rng(seed).permutation(len(data))
    for fold in range(min(FOLDS, len(data))):
        left_out = np.sort(order[fold::FOLDS])
        rest = data.take(np.setdiff1d(order, left_out))
        part = data.take(left_out)
        intervals = (
            Intervals.fit(rest, confidence)
            if audit is None
            else Intervals.fit(held_out, confidence, rest)
        )
        if intervals.quantile is None:
            return None
        width = intervals.around(part.predicted, part.doubt, part.label)
        inside[left_out] = np.abs(part.residual) <= width
    return inside


def _fit_sigma(data: Calibration, weight: np.ndarray) -> Intervals:
    """Return intervals with sigma, but without f and q."""
    middle, size = float(np.median(data.predicted)), np.abs(data.residual)
    columns = _columns(data.predicted, data.doubt, middle)
    of_class: dict[int, float] = {}
    for _ in range(TURNS):
        scale = _fit_scale(columns * _by_label(of_class, data.label)[:, None], size, weight)
        of_class = _class_factors(size / (columns * scale).sum(1), weight, data.label)
    return Intervals(None, 0.0, len(data), 0, tuple(scale.tolist()), middle, of_class=of_class)


def _class_factors(ratio: np.ndarray, weight: np.ndarray, label: np.ndarray) -> dict[int, float]:
    """Return the mean ratio of every class relative to that of all samples, shrunk towards 1."""
    relative = ratio / np.average(ratio, weights=weight)
    labelled = label >= 0
    classes, own = np.unique(label[labelled], return_inverse=True)
    relative, weight = relative[labelled], weight[labelled]
    total = np.bincount(own, weight)
    count = total**2 / np.bincount(own, np.square(weight))  # effective number of samples
    mean = np.bincount(own, weight * relative) / total
    factor = (count * mean + PRIOR_OF_CLASS) / (count + PRIOR_OF_CLASS)
    return dict(zip(classes.tolist(), factor.tolist(), strict=True))


def _by_label(of_class: Mapping[int, float], label: np.ndarray) -> np.ndarray:
    """Return the factor of each sample's class, float64 [n]; 1 for classes without one."""
    table = np.ones(max(of_class, default=-1) + 2)  # the last one is that of other labels
    table[list(of_class)] = list(of_class.values())
    known = (label >= 0) & (label < len(table))
    return table[np.where(known, label, -1)]


def _cross_fitted_ratios(data: Calibration, weight: np.ndarray) -> np.ndarray:
    """Return |residual| / sigma, each with a sigma from the other samples, float64 [n].

    Without this, sigma fits its own samples too well, and q would be too small.
    """
    order = np.random.default_rng(0).permutation(len(data))
    result = np.empty(len(data))
    for fold in range(min(FOLDS, len(order))):
        part = order[fold::FOLDS]
        rest = np.setdiff1d(order, part)
        own = data.take(part)
        residual = np.abs(own.residual)
        if len(rest) and np.abs(data.residual[rest]).max():
            fitted = _fit_sigma(data.take(rest), weight[rest])
            result[part] = residual / fitted._sigma(own.predicted, own.doubt, own.label)
        else:
            result[part] = np.where(residual > 0, np.inf, 0.0)
    return result


def _zone_values(
    predicted: np.ndarray, doubt: np.ndarray, middle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return by what samples are extreme, and by what they are far, float64 [n] each."""
    predicted = np.asarray(predicted, np.float64)
    return np.abs(predicted - middle), np.asarray(doubt, np.float64)[:, 0]


def _columns(predicted: np.ndarray, doubt: np.ndarray, middle: float) -> np.ndarray:
    """Return what sigma is a sum of, float64 [n, 2 + d]."""
    predicted = np.asarray(predicted, np.float64)
    extremeness = np.abs(predicted - middle)
    return np.column_stack([np.ones(len(predicted)), np.asarray(doubt, np.float64), extremeness])


def _fit_scale(columns: np.ndarray, size: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the coefficients of sigma, float64 [c], from absolute residuals."""
    mean = np.average(columns, axis=0, weights=weight)
    used = mean > 0
    unit = columns[:, used] / mean[used]
    count, typical = int(used.sum()), float(np.average(size, weights=weight))
    root = np.sqrt(weight)
    prior = math.sqrt(PRIOR_SAMPLES / count)
    solution, _ = nnls(
        np.concatenate([unit * root[:, None], prior * np.eye(count)]),
        np.concatenate([size * root, np.full(count, prior * typical / count)]),
    )
    # nothing is predicted with certainty: sigma must not be 0
    solution[0] += 1e-3 * typical
    result = np.zeros(columns.shape[1])
    result[used] = solution / mean[used]
    return result


def _ratio_to(overall: float, ratio: np.ndarray, weight: np.ndarray, confidence: float) -> float:
    """Return the quantile of some samples relative to that of all, shrunk towards 1."""
    own = _weighted_quantile(ratio, weight, confidence) if len(ratio) else 0.0
    if not (0 < own < math.inf and 0 < overall < math.inf):
        return 1.0
    count = float(weight.sum() ** 2 / np.square(weight).sum())  # effective number of samples
    return (own / overall) ** (count / (count + PRIOR_OF_ZONE))


def _weighted_quantile(values: np.ndarray, weight: np.ndarray, confidence: float) -> float:
    """Return the quantile of a weighted sample; with equal weights at rank (n + 1) confidence."""
    order = np.argsort(values)
    ordered, own = values[order], weight[order]
    position = np.cumsum(own) / (own.sum() + own.mean())
    return float(np.interp(confidence, position, ordered))


def _quantile(values: np.ndarray, confidence: float) -> float | None:
    """Return the ceil((n + 1) * confidence)-th smallest of n values; None if n is too small."""
    # 1e-9: rounding must not turn 0.9 * 10 into rank 10
    rank = math.ceil((len(values) + 1) * confidence - 1e-9)
    return float(np.partition(values, rank - 1)[rank - 1]) if 0 < rank <= len(values) else None
