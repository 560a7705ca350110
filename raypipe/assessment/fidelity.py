"""How well extrapolated scores rank samples compared with measured ones, on samples not fitted on.

The samples and their predictions are those of `raypipe.assessment.held_out`. Samples with extreme
predictions can be measured as well (`raypipe.assessment.extremes`). All figures are then weighted,
so that they stay those of a random draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raypipe.assessment.coverage import Coverage, measure_coverage
from raypipe.assessment.held_out import ExtremePredictions, HeldOutPredictions
from raypipe.assessment.rank_agreement import (
    MIN_SAMPLES,
    NO_AGREEMENT,
    Ceiling,
    RankAgreement,
    ceiling,
    chance,
    rank_agreement,
)
from raypipe.errors import RaypipeError

KEEP_FRACTIONS = (0.3, 0.5, 0.7)
"""Keep fractions at which the overlap of the tops is computed."""


@dataclass(frozen=True)
class Fidelity(RankAgreement):
    """Agreement of predicted with measured scores, next to that of simpler predictions.

    Attributes
    ----------
    baselines
        Agreement of simpler predictions by name: class_mean, knn_published, proxy_loss, random, ...
    n_fit, n_held
        Number of samples in the fit, and of those drawn at random to assess it.
    n_extremes
        Number of samples that were drawn from the extreme predictions in addition.
    note
        Why a figure is None; else empty.
    rmse, spread
        Root mean square of measured minus predicted scores, and standard deviation of the measured
        scores.
    ceiling
        The best agreement that ties in the measured scores allow.
    coverage
        How often the intervals hold.
    proxy_accuracy, proxy_chance, proxy_balanced
        See `accuracy_figures`.
    """

    baselines: dict[str, RankAgreement] = field(default_factory=dict)
    n_fit: int = 0
    n_held: int = 0
    n_extremes: int = 0
    note: str = ""
    rmse: float | None = None
    spread: float | None = None
    ceiling: Ceiling | None = None
    coverage: Coverage | None = None
    proxy_accuracy: float | None = None
    proxy_chance: float | None = None
    proxy_balanced: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as JSON data."""
        baselines = {name: agreement.as_dict() for name, agreement in self.baselines.items()}
        return super().as_dict() | {
            "baselines": baselines,
            "n_fit": self.n_fit,
            "n_held": self.n_held,
            "n_extremes": self.n_extremes,
            "note": self.note,
            "rmse": self.rmse,
            "spread": self.spread,
            "ceiling": self.ceiling.as_dict() if self.ceiling else None,
            "coverage": self.coverage.as_dict() if self.coverage else None,
            "proxy_accuracy": self.proxy_accuracy,
            "proxy_chance": self.proxy_chance,
            "proxy_balanced": self.proxy_balanced,
        }


def compare(
    held_out: HeldOutPredictions,
    seed: int,
    keep: Sequence[float] = KEEP_FRACTIONS,
    confidence: float | None = None,
    calibration: HeldOutPredictions | None = None,
    extremes: ExtremePredictions | None = None,
) -> Fidelity:
    """Return the fidelity of predictions for samples that were not fitted on.

    Parameters
    ----------
    held_out
        The predictions for a random draw.
    seed
        Seed of the bootstrap.
    keep
        Keep fractions for the overlaps.
    confidence
        That of the intervals whose coverage is computed; None for no coverage.
    calibration
        Held-out samples of the seed set that the intervals are calibrated on as well, if
        `held_out` is an audit set.
    extremes
        Samples drawn from the extreme predictions in addition. All figures but those of the
        baselines, which have the random draw alone, are then weighted.

    Raises
    ------
    RaypipeError
        Lengths differ or a value is not finite.
    """
    data, weight = _with_extremes(held_out, extremes)
    baselines = {name: np.asarray(value, np.float64) for name, value in held_out.baselines.items()}
    for name, value in baselines.items():
        _check_comparable(name, value, held_out.measured)
    measured = np.asarray(data.measured, np.float64)
    predicted = np.asarray(data.predicted, np.float64)
    _check_comparable("", predicted, measured)
    n = len(held_out)
    undefined = _why_undefined(measured[:n])
    if undefined:
        return Fidelity(
            **vars(NO_AGREEMENT),
            baselines=dict.fromkeys(baselines, NO_AGREEMENT),
            n_fit=held_out.n_fit,
            n_held=n,
            note=(held_out.note if n < MIN_SAMPLES else "") or undefined,
        )
    note = held_out.note
    if not np.ptp(held_out.predicted):
        note = "all held-out samples got the same predicted score"
    own = rank_agreement({"": predicted}, measured, seed, keep, data.label, weight)[""]
    # baselines are not predicted for the extremes
    agreement = rank_agreement(baselines, measured[:n], seed, keep, held_out.label)
    proxy = accuracy_figures(data.label, data.correct, weight)
    mean = np.average(measured, weights=weight)
    return Fidelity(
        **vars(own),
        baselines=agreement | {"random": chance(n, keep)},
        n_fit=held_out.n_fit,
        n_held=n,
        n_extremes=len(data) - n,
        note=note,
        rmse=float(np.sqrt(np.average(np.square(data.residual), weights=weight))),
        spread=float(np.sqrt(np.average(np.square(measured - mean), weights=weight))),
        ceiling=ceiling(measured[:n], keep),
        coverage=_coverage(held_out, confidence, seed, calibration, extremes),
        **proxy,
    )


def _with_extremes(
    held_out: HeldOutPredictions, extremes: ExtremePredictions | None
) -> tuple[HeldOutPredictions, np.ndarray]:
    """Return the random draw, then the extreme samples, and the weights of all."""
    if extremes is None or not len(held_out):
        return held_out, np.ones(len(held_out))
    weight = extremes.zone.weights(held_out.predicted, len(extremes.predictions))
    return HeldOutPredictions.concat([held_out, extremes.predictions]), weight


def _coverage(
    held_out: HeldOutPredictions,
    confidence: float | None,
    seed: int,
    calibration: HeldOutPredictions | None,
    extremes: ExtremePredictions | None,
) -> Coverage | None:
    if confidence is None:
        return None
    own = held_out.calibration()
    return measure_coverage(
        calibration.calibration() if calibration is not None else own,
        confidence,
        seed,
        own if calibration is not None else None,
        extremes.predictions.calibration() if extremes is not None else None,
        extremes.zone if extremes is not None else None,
    )


def accuracy_figures(
    label: np.ndarray, correct: np.ndarray | None, weight: np.ndarray | None = None
) -> dict[str, Any]:
    """Return the accuracy of the proxy on samples, and what chance gives.

    Parameters
    ----------
    label
        Classes, int64 [n]; those below 0 do not count.
    correct
        Whether the proxy gives the samples their label, bool [n]; None without a proxy.
    weight
        Weights of the samples, float64 [n]; None for equal ones.

    Returns
    -------
    dict
        proxy_accuracy, proxy_chance (share of the largest class) and proxy_balanced: accuracy
        (mean over classes), chance, and its standard error by chance. Empty if unknown.
    """
    labelled = label >= 0
    if correct is None or not labelled.any():
        return {}
    weight = np.ones(len(label)) if weight is None else weight
    label, correct, weight = label[labelled], correct[labelled], weight[labelled]
    total, squares = np.bincount(label, weight), np.bincount(label, np.square(weight))
    present = total > 0
    right, total, squares = np.bincount(label, weight * correct), total[present], squares[present]
    by_class = right[present] / total
    classes = len(total)
    chance = 1 / classes
    # a class of n samples of equal weight adds 1 / n
    error = np.sqrt(chance * (1 - chance) * (squares / total**2).sum()) / classes
    return {
        "proxy_accuracy": float(right.sum() / total.sum()),
        "proxy_chance": float(total.max() / total.sum()),
        "proxy_balanced": {
            "accuracy": float(by_class.mean()),
            "chance": chance,
            "error": float(error),
        },
    }


def _check_comparable(name: str, predicted: np.ndarray, measured: np.ndarray) -> None:
    """Raise RaypipeError unless both are finite and of the same length."""
    if predicted.ndim != 1 or predicted.shape != measured.shape:
        raise RaypipeError(
            f"{list(predicted.shape)} predicted scores {name} do not match "
            f"{list(measured.shape)} measured ones"
        )
    bad = int((~np.isfinite(predicted) | ~np.isfinite(measured)).sum())
    if bad:
        raise RaypipeError(
            f"{bad} of {len(measured)} held-out samples have scores {name} that are not finite"
        )


def _why_undefined(measured: np.ndarray) -> str:
    """Return why no agreement can be computed with these scores; else an empty string."""
    if len(measured) < MIN_SAMPLES:
        return (
            f"only {len(measured)} held-out samples; at least {MIN_SAMPLES} are needed: "
            "raise seed.fraction or extrapolate.holdout"
        )
    if not np.ptp(measured):
        return "all held-out samples have the same measured score, so there is no order to predict"
    return ""
