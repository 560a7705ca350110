"""What a night concludes: what changed in the source, how faithful the scores of new samples are, whether to refresh. Plain functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from raypipe.assessment.drift import Drift
from raypipe.assessment.rank_agreement import rank_agreement, spearman, spearman_of_resamples
from raypipe.config import NightlySettings, TrustSettings

FEWEST_AUDITED = 30
"""Measured new samples below which their fidelity advises nothing."""
FALL_LEVEL = 0.99

Piece = Mapping[str, Any]
"""A fragment as a snapshot lists it: file (named after the fragment), path of the source file, samples."""


def changes(before: Iterable[Piece], after: Iterable[Piece]) -> dict[str, dict[str, int]]:
    """Files and samples of the source that are new, changed (another fingerprint under the same path) and removed.

    A fragment's name is a fingerprint of its file. Samples of a changed file are counted where its fragments are new, all of them as
    changed: nothing tells which of them are as they were.
    """
    old, new = _by_path(before), _by_path(after)
    changed = {path for path in old.keys() & new.keys() if old[path].keys() != new[path].keys()}
    files = {
        "new": len(new.keys() - old.keys()),
        "changed": len(changed),
        "removed": len(old.keys() - new.keys()),
    }
    samples = {
        "new": sum(sum(new[path].values()) for path in new.keys() - old.keys()),
        "changed": sum(
            sum(count for name, count in new[path].items() if name not in old[path])
            for path in changed
        ),
        "removed": sum(sum(old[path].values()) for path in old.keys() - new.keys()),
        "total": sum(sum(pieces.values()) for pieces in new.values()),
    }
    return {"files": files, "samples": samples}


def _by_path(pieces: Iterable[Piece]) -> dict[str, dict[str, int]]:
    result: dict[str, dict[str, int]] = {}
    for piece in pieces:
        result.setdefault(piece["path"], {})[piece["file"]] = piece["samples"]
    return result


def assess(
    predicted: np.ndarray,
    measured: np.ndarray,
    first: tuple[np.ndarray, np.ndarray] | None,
    seed: int,
) -> dict[str, Any]:
    """Fidelity on new samples: predicted and measured scores, float64 [n], beside those of the run's first audit, where it had one.

    spearman, interval         rank correlation with its 95 % bootstrap interval; None where it is undefined
    first, fall, fall_interval that of the first audit, and the difference (below 0: it fell) with its 99 % interval, under independent
                               resamples of both: it is asked every night, so that 95 % would err too often
    """
    found = rank_agreement({"": predicted}, measured, seed, ())[""] if len(measured) > 1 else None
    result: dict[str, Any] = {
        "n": len(measured),
        "spearman": found.spearman if found else None,
        "interval": list(found.spearman_interval) if found and found.spearman_interval else None,
        "first": None,
        "fall": None,
        "fall_interval": None,
        "note": "",
    }
    if found is None or found.spearman is None:
        result["note"] = f"{len(measured)} measured new samples have no rank correlation"
    if first is not None:
        result["first"] = spearman(*first)
    if result["first"] is not None and result["spearman"] is not None and first is not None:
        now = spearman_of_resamples({"": predicted}, measured, seed + 1)[""]
        then = spearman_of_resamples({"": first[0]}, first[1], seed + 2)[""]
        count = min(len(now), len(then))
        difference = now[:count] - then[:count]
        bounds = np.nanquantile(difference, [(1 - FALL_LEVEL) / 2, (1 + FALL_LEVEL) / 2])
        result |= {"fall": result["spearman"] - result["first"], "fall_interval": bounds.tolist()}
    return result


def advice(found: Mapping[str, Any], settings: NightlySettings, trust: TrustSettings) -> list[str]:
    """Why a refresh (a new seed set, proxy and extrapolator) is advised, in sentences; none where it is not.

    found  drift (by window), fidelity and share_since_seed, as a snapshot has them
    """
    reasons = []
    for window, data in (found.get("drift") or {}).items():
        drift = Drift.from_dict(data)
        if drift.beyond(settings.max_drift):
            parts = (
                ("auc", drift.auc, drift.auc_interval),
                ("farther", drift.farther, drift.farther_interval),
            )
            shown = ", ".join(
                f"{name} {value:.2f} ({between[0]:.2f} to {between[1]:.2f})"
                for name, value, between in parts
                if value and between
            )
            reasons.append(
                f"drift: {WINDOWS[window]} differ from old ones: {shown}; nightly.max_drift is {settings.max_drift:g}"
            )
    fidelity = found.get("fidelity") or {}
    if fidelity.get("spearman") is not None and fidelity["n"] >= FEWEST_AUDITED:
        value, between = fidelity["spearman"], fidelity["fall_interval"]
        if trust.min_spearman > -1 and value < trust.min_spearman:
            reasons.append(
                f"fidelity: {value:.2f} on {fidelity['n']} new samples is below trust.min_spearman ({trust.min_spearman:g})"
            )
        if between is not None and between[1] < 0:
            reasons.append(
                f"fidelity: {value:.2f} on {fidelity['n']} new samples, {fidelity['first']:.2f} in the run's first audit; the difference "
                f"is {fidelity['fall']:.2f} ({between[0]:.2f} to {between[1]:.2f})"
            )
    share = found.get("share_since_seed") or 0.0
    if share > settings.max_new_share:
        reasons.append(
            f"growth: {100 * share:.0f} % of the samples came after the seed set; nightly.max_new_share is {settings.max_new_share:g}"
        )
    return reasons


WINDOWS = {"tonight": "the samples of this night", "since": "the samples since the seed set"}
"""Sets of new samples whose drift is told."""
