"""Problems of tables that do not stop an extrapolation: their number by kind, and the first ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_IDS, SHOWN_IDS = 100, 5
"""Ids of each kind of problem that are recorded, and how many of these a message names."""
PROBLEMS = {
    "score_without_id": "scores without a sample_id, ignored",
    "score_not_finite": (
        "scores that are missing, NaN or infinite; these samples count as not scored"
    ),
    "score_repeated": "samples that have the same score more than once, used once",
    "score_without_embedding": "scored samples without an embedding, ignored",
    "embedding_without_id": "embeddings without a sample_id, left out",
    "embedding_missing": "samples whose embedding is null, left out",
    "embedding_width": (
        "samples whose embedding has another width than those of the scored samples, left out"
    ),
    "embedding_not_finite": (
        "samples with missing, NaN or infinite values in the embedding, left out"
    ),
}
"""Problems that do not stop an extrapolation, and how each is handled."""


class ProblemCounts:
    """Number of problems of each kind, with the first ids.

    Parameters
    ----------
    counts : dict, optional
        Initial state, as `as_dict` returns it.
    """

    def __init__(self, counts: dict[str, dict[str, Any]] | None = None) -> None:
        self._counts: dict[str, dict[str, Any]] = counts or {}

    def add(self, kind: str, ids: Iterable[str]) -> None:
        """Count one problem per id. `kind` is a key of `PROBLEMS`."""
        for sample_id in ids:
            problem = self._counts.setdefault(kind, {"count": 0, "ids": []})
            problem["count"] += 1
            if len(problem["ids"]) < MAX_IDS:
                problem["ids"].append(sample_id)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return `count` and the first `ids` of every kind that occurred, as JSON."""
        return {kind: self._counts[kind] for kind in PROBLEMS if kind in self._counts}

    def lines(self) -> list[str]:
        """Return one line of text per kind that occurred."""
        return [
            f"{PROBLEMS[kind]}: {problem['count']:,} "
            f"({shortened(problem['ids'], problem['count'])})"
            for kind, problem in self.as_dict().items()
        ]


def shortened(ids: list[str], count: int) -> str:
    """Return the first of `count` ids as text: "a, b, c, ..."."""
    return ", ".join(ids[:SHOWN_IDS]) + (", ..." if count > len(ids[:SHOWN_IDS]) else "")
