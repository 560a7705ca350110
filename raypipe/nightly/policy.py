"""Conclusions of a night: what changed, how faithful the new scores are, whether to refresh.

Plain functions and values, without storage and Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raypipe.assessment.drift import Drift
from raypipe.assessment.rank_agreement import rank_agreement, spearman, spearman_of_resamples
from raypipe.config import NightlySettings, TrustSettings

MIN_AUDITED = 30
"""Measured new samples below which their fidelity is no reason for a refresh."""
FALL_LEVEL = 0.99
"""Confidence level of the interval of the fall. The test is repeated every night, so that at 95 %
it would give a false alarm too often."""
WINDOWS = {"tonight": "the samples of this night", "since": "the samples since the seed set"}
"""Sets of new samples whose drift is measured."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class ListedFragment:
    """A fragment as a snapshot lists it.

    Attributes
    ----------
    name : str
        Name of its score shard: a fingerprint of the source file.
    path : str
        Path of the source file.
    samples : int
        Number of samples.
    """

    name: str
    path: str
    samples: int


@dataclass(frozen=True)
class SourceChanges:
    """Source files and samples that are new, changed and removed, by "new", "changed", "removed".

    `samples` also has the "total" after the change.
    """

    files: Mapping[str, int]
    samples: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return the part of a snapshot that holds the counts."""
        return {"files": dict(self.files), "samples": dict(self.samples)}


def source_changes(
    before: Iterable[ListedFragment],
    after: Iterable[ListedFragment],
    *,
    new: int = 0,
    changed: int = 0,
    removed: int = 0,
) -> SourceChanges:
    """Compare two listings of a source.

    A file, or a group of neighbouring small files, is changed if its path is the same but a
    fingerprint differs. The numbers of samples are those of `raypipe.nightly.known`.
    """
    old, present = _by_path(before), _by_path(after)
    files = {
        "new": len(present.keys() - old.keys()),
        "changed": sum(
            old[path].keys() != present[path].keys() for path in old.keys() & present.keys()
        ),
        "removed": len(old.keys() - present.keys()),
    }
    total = sum(sum(fragments.values()) for fragments in present.values())
    return SourceChanges(
        files, {"new": new, "changed": changed, "removed": removed, "total": total}
    )


def _by_path(fragments: Iterable[ListedFragment]) -> dict[str, dict[str, int]]:
    """Return the samples of every fragment, by path and name."""
    result: dict[str, dict[str, int]] = {}
    for fragment in fragments:
        result.setdefault(fragment.path, {})[fragment.name] = fragment.samples
    return result


@dataclass(frozen=True)
class NewFidelity:
    """Rank correlation of predicted with measured scores of new samples.

    Attributes
    ----------
    n : int
        Measured samples; 0 if none were measured.
    spearman, interval : float, (float, float), optional
        Rank correlation and its 95 % bootstrap interval; None where they are undefined.
    first : float, optional
        Rank correlation of the run's first audit; None if it had none.
    fall, fall_interval : float, (float, float), optional
        Difference from the first audit (negative: fidelity fell) and its 99 % interval, from
        independent resamples of both.
    note : str
        Why `spearman` is None, or "".
    """

    n: int = 0
    spearman: float | None = None
    interval: Interval | None = None
    first: float | None = None
    fall: float | None = None
    fall_interval: Interval | None = None
    note: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NewFidelity:
        """Restore what `as_json` returned."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        """Return the fidelity in a snapshot, which has fewer keys if nothing was measured."""
        if not self.n:
            return {"n": 0, "spearman": None, "note": self.note}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }


def new_fidelity(
    predicted: np.ndarray,
    measured: np.ndarray,
    first_audit: tuple[np.ndarray, np.ndarray] | None,
    seed: int,
) -> NewFidelity:
    """Compute the fidelity on new samples.

    Parameters
    ----------
    predicted, measured : numpy.ndarray
        Scores of the same new samples, float64 [n].
    first_audit : tuple of numpy.ndarray, optional
        Predicted and measured scores of the run's first audit, float64 [m].
    seed : int
        Seed of the bootstrap.
    """
    n = len(measured)
    agreement = rank_agreement({"": predicted}, measured, seed, ())[""] if n > 1 else None
    value = agreement.spearman if agreement else None
    first = spearman(*first_audit) if first_audit is not None else None
    fall, fall_interval = None, None
    if first_audit is not None and first is not None and value is not None:
        now = spearman_of_resamples({"": predicted}, measured, seed + 1)[""]
        then = spearman_of_resamples({"": first_audit[0]}, first_audit[1], seed + 2)[""]
        resamples = min(len(now), len(then))
        differences = now[:resamples] - then[:resamples]
        quantiles = [(1 - FALL_LEVEL) / 2, (1 + FALL_LEVEL) / 2]
        low, high = np.nanquantile(differences, quantiles).tolist()
        fall, fall_interval = value - first, (low, high)
    return NewFidelity(
        n=n,
        spearman=value,
        interval=agreement.spearman_interval if agreement else None,
        first=first,
        fall=fall,
        fall_interval=fall_interval,
        note=""
        if value is not None
        else f"no rank correlation can be computed from {n} measured new samples",
    )


@dataclass(frozen=True)
class Assessment:
    """Whatever can be a reason for a refresh.

    Attributes
    ----------
    drift : mapping of str to Drift
        Drift of the embeddings by window, see `WINDOWS`.
    fidelity : NewFidelity, optional
        Fidelity on new samples; None before the first night.
    share_since_seed : float
        Share of all samples that came after the seed set.
    """

    drift: Mapping[str, Drift] = field(default_factory=dict)
    fidelity: NewFidelity | None = None
    share_since_seed: float = 0.0

    @classmethod
    def from_json(cls, manifest: Mapping[str, Any]) -> Assessment:
        """Read the assessment in a snapshot."""
        drift, fidelity = manifest["drift"] or {}, manifest["fidelity"]
        return cls(
            {window: Drift.from_dict(data) for window, data in drift.items()},
            NewFidelity.from_json(fidelity) if fidelity else None,
            manifest["share_since_seed"],
        )


def refresh_reasons(
    assessment: Assessment, settings: NightlySettings, trust: TrustSettings
) -> list[str]:
    """Return the reasons for a refresh (new seed set, proxy and extrapolator), as sentences."""
    reasons = _drift_reasons(assessment.drift, settings)
    if assessment.fidelity is not None:
        reasons += _fidelity_reasons(assessment.fidelity, trust)
    share = assessment.share_since_seed
    if share > settings.max_new_share:
        reasons.append(
            f"growth: {100 * share:.0f} % of the samples came after the seed set; "
            f"nightly.max_new_share is {settings.max_new_share:g}"
        )
    return reasons


def _drift_reasons(drifts: Mapping[str, Drift], settings: NightlySettings) -> list[str]:
    reasons = []
    for window, drift in drifts.items():
        if not drift.beyond(settings.max_drift):
            continue
        figures = (
            ("auc", drift.auc, drift.auc_interval),
            ("farther", drift.farther, drift.farther_interval),
        )
        shown = ", ".join(
            f"{name} {value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"
            for name, value, interval in figures
            if value and interval
        )
        reasons.append(
            f"drift: {WINDOWS[window]} differ from old ones: {shown}; "
            f"nightly.max_drift is {settings.max_drift:g}"
        )
    return reasons


def _fidelity_reasons(fidelity: NewFidelity, trust: TrustSettings) -> list[str]:
    value, fall, interval = fidelity.spearman, fidelity.fall, fidelity.fall_interval
    if value is None or fidelity.n < MIN_AUDITED:
        return []
    reasons = []
    if trust.min_spearman > -1 and value < trust.min_spearman:
        reasons.append(
            f"fidelity: {value:.2f} on {fidelity.n} new samples is below trust.min_spearman "
            f"({trust.min_spearman:g})"
        )
    if fall is not None and interval is not None and interval[1] < 0:
        reasons.append(
            f"fidelity: {value:.2f} on {fidelity.n} new samples, {fidelity.first:.2f} in the "
            f"run's first audit; the difference is {fall:.2f} "
            f"({interval[0]:.2f} to {interval[1]:.2f})"
        )
    return reasons
