"""Fidelity in the report: what the extrapolator wrote about itself, with a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raypipe import storage
from raypipe.errors import RaypipeError
from raypipe.report.formats import SPACE, fixed
from raypipe.report.json_values import clean
from raypipe.report.schema import Agreement, Fidelity, HeldOutFidelity
from raypipe.report.score_scan import ScoreScan
from raypipe.report.verdict import experimental, trust_verdict
from raypipe.runs.run import Run

LATER_FIGURES = (
    "n_extremes",
    "rmse",
    "spread",
    "ceiling",
    "coverage",
    "proxy_accuracy",
    "proxy_chance",
    "proxy_balanced",
)
"""Figures of fidelity that runs of version 0.2.0 or older do not have."""


def read_assessment(run: Run) -> dict[str, Any]:
    """Return what the extrapolator wrote about itself; empty if that is missing or damaged."""
    try:
        content = storage.read_json(run.extrapolator_summary)
    except (FileNotFoundError, RaypipeError):
        return {}
    return clean(content) if isinstance(content, dict) else {}


def fidelity_figures(
    assessment: Mapping[str, Any],
    scan: ScoreScan,
    stability: Mapping[str, Any],
    within_classes: bool,
) -> Fidelity:
    """Return the fidelity to go by, with a verdict."""
    held_out = _held_out_fidelity(assessment.get("fidelity"))
    method = assessment.get("method")
    if "spearman_within" in held_out:
        held_out["within_classes"] = within_classes
    verdict, sentence = trust_verdict(
        {**held_out, "method": method},
        stability,
        scan.samples - scan.measured if scan.samples else None,
    )
    sentence += experimental(assessment.get("score"))
    return {
        **held_out,
        "method": method,
        "score": assessment.get("score"),
        "verdict": verdict,
        "sentence": sentence,
    }


def seed_fidelity(assessment: Mapping[str, Any]) -> HeldOutFidelity | None:
    """Return the fidelity on held-out seed samples, where it is not the one to go by."""
    stated = assessment.get("fidelity_seed")
    return _held_out_fidelity(stated) if stated else None


def learning_curve(assessment: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the learning curve, and what a larger seed set would bring; None without points."""
    curve = assessment.get("learning_curve")
    if not isinstance(curve, dict) or not curve.get("points"):
        return None
    return {**curve, "sentence": _larger_seed_set(curve)}


def _larger_seed_set(curve: Mapping[str, Any]) -> str:
    """Return a sentence about what doubling the seed set is predicted to gain."""
    doubled = curve["doubled"]
    gain, bounds = doubled.get("gain"), doubled.get("gain_interval")
    if gain is None:
        return "The learning curve does not show how much a larger seed set would gain."
    between = (
        f" (95{SPACE}% range {fixed(bounds[0], 3)} to {fixed(bounds[1], 3)})" if bounds else ""
    )
    return (
        "Doubling the seed set is predicted to raise the Spearman correlation by "
        f"{fixed(gain, 3)}{between}."
    )


def neighbour_search(assessment: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how neighbours were searched: exactly, or by inverted lists with some recall."""
    search = assessment.get("search")
    return search if isinstance(search, dict) else None


def _held_out_fidelity(stated: Any) -> HeldOutFidelity:
    """Return the figures of the extrapolator and of every baseline.

    A baseline is stated as its Spearman correlation, or as a mapping with all figures.
    """
    stated = stated if isinstance(stated, dict) else {}
    # runs of version 0.2.0 or older do not have these
    more: Any = {name: stated[name] for name in LATER_FIGURES if name in stated}
    return {
        **_agreement(stated),
        **more,
        "n_fit": stated.get("n_fit"),
        "n_held": stated.get("n_held"),
        "note": stated.get("note"),
        "judged_on": stated.get("judged_on"),
        "baselines": {
            name: _agreement(figures if isinstance(figures, dict) else {"spearman": figures})
            for name, figures in (stated.get("baselines") or {}).items()
        },
    }


def _agreement(stated: Mapping[str, Any]) -> Agreement:
    """Return correlations and overlaps with their intervals, which are stated in two ways."""
    spearman_low, spearman_high = _stated_interval(stated, "spearman")
    pearson_low, pearson_high = _stated_interval(stated, "pearson")
    overlap = (stated.get("overlap") or {}).items()
    within: Any = {}
    if "spearman_within" in stated:
        low, high = _stated_interval(stated, "spearman_within")
        within = {
            "spearman_within": stated["spearman_within"],
            "spearman_within_low": low,
            "spearman_within_high": high,
        }
    return {
        **within,
        "spearman": stated.get("spearman"),
        "spearman_low": spearman_low,
        "spearman_high": spearman_high,
        "pearson": stated.get("pearson"),
        "pearson_low": pearson_low,
        "pearson_high": pearson_high,
        "overlap": {fraction: value for fraction, value in overlap if value is not None},
        "overlap_interval": stated.get("overlap_interval") or {},
    }


def _stated_interval(stated: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    low, high = stated.get(f"{name}_interval") or (
        stated.get(f"{name}_low"),
        stated.get(f"{name}_high"),
    )
    return low, high
