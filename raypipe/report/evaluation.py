"""The result of `raypipe evaluate`, for the page and `summary.json`."""

from __future__ import annotations

from typing import Any

from raypipe import storage
from raypipe.errors import RaypipeError
from raypipe.report.schema import Evaluation
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run

FORMAT = 1
"""The version of `evaluation/summary.json` that is understood."""

Point = tuple[float, float, float | None, float | None]
"""Keep fraction, accuracy, and both ends of its interval (None without one)."""
Curve = tuple[str, list[Point]]
"""A name and its points."""


def read_evaluation(run: Run, extrapolated: StageRecord | None) -> Evaluation | None:
    """Return the content of `evaluation/summary.json`, or None if the run has none.

    The key `outdated` is added: whether the evaluation was made for earlier scores.

    Parameters
    ----------
    run
        The run that was evaluated.
    extrapolated
        The ledger's record of the stage that wrote the scores.
    """
    try:
        summary = storage.read_json(run.evaluation_summary)
    except (FileNotFoundError, RaypipeError):
        return None
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        return None
    evaluated = summary.get("scores_of") or {}
    current = (
        {"fingerprint": extrapolated.fingerprint, "finished": extrapolated.finished}
        if extrapolated is not None
        else {}
    )
    return {**summary, "outdated": evaluated != current}


def curves(evaluation: Evaluation) -> list[Curve]:
    """Return the accuracies of the random lists, then those of every list compared with them."""
    named = [
        ("random", evaluation["random"]),
        *((listed["name"], listed["fractions"]) for listed in evaluation["lists"]),
    ]
    return [(name, [_point(point) for point in points]) for name, points in named]


def _point(point: dict[str, Any]) -> Point:
    accuracy = point["accuracy"]
    return point["fraction"], accuracy["mean"], accuracy["low"], accuracy["high"]
