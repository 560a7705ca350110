"""What an evaluation found (`raypipe evaluate`), for the page and `summary.json`."""

from __future__ import annotations

from typing import Any

from raypipe import storage
from raypipe.errors import RaypipeError
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord

FORMAT = 1
"""Version of `evaluation/summary.json` that is understood."""


def evaluation_of(run: Run, extrapolated: StageRecord | None) -> dict[str, Any] | None:
    """The content of `evaluation/summary.json`, and whether it is `outdated`: of other scores than those there are. None without one.

    extrapolated  the ledger's record of the stage that wrote the scores
    """
    try:
        found = storage.read_json(run.path("evaluation", "summary.json"))
    except (FileNotFoundError, RaypipeError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return None
    of = found.get("scores_of") or {}
    now = (
        {"fingerprint": extrapolated.fingerprint, "finished": extrapolated.finished}
        if extrapolated is not None
        else {}
    )
    return {**found, "outdated": of != now}


def curves(
    found: dict[str, Any],
) -> list[tuple[str, list[tuple[float, float, float | None, float | None]]]]:
    """Name and points (fraction, accuracy, low, high) of the random lists, and of each list that is compared."""
    named = [
        ("random", found["random"]),
        *((listed["name"], listed["fractions"]) for listed in found["lists"]),
    ]
    return [
        (
            name,
            [
                (point["fraction"], *(point["accuracy"][key] for key in ("mean", "low", "high")))
                for point in points
            ],
        )
        for name, points in named
    ]
