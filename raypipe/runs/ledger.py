"""The ledger of a run, `run.json`: state, fingerprint and cost of every stage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from raypipe.runs.unit_result import UnitResult
from raypipe.sources.noise import LabelNoise

FORMAT = 1
"""Version of the layout of a run folder. Runs with another version are refused."""


@dataclasses.dataclass
class StageRecord:
    """What the ledger records of one stage.

    Attributes
    ----------
    state : str
        "running", "done", "failed" or "refused".
    fingerprint : str
        Of the settings that the outputs depend on.
    samples : int
        Samples that the stage processed.
    wall_seconds, cpu_seconds, gpu_seconds : float
        Time, summed over interrupted attempts.
    attempts : int
        Number of attempts.
    finished : str
        Time of the end, UTC.
    error : str
        Why the stage failed, or "".
    detail : dict
        Details that only this stage records.
    """

    state: str = "running"
    fingerprint: str = ""
    samples: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    attempts: int = 0
    finished: str = ""
    error: str = ""
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add_cost(self, result: UnitResult, gpus: float = 1.0) -> None:
        """Add what a unit cost; `gpus` is the share of a GPU that its worker holds."""
        self.cpu_seconds += result.cpu_seconds
        self.gpu_seconds += result.gpu_seconds * gpus


def checked_record(record: StageRecord) -> StageRecord:
    """Return the record. Raises ValueError naming the first field of a wrong type or range."""
    for item in dataclasses.fields(StageRecord):
        value, default = getattr(record, item.name), StageRecord().__dict__[item.name]
        kind: Any = (int, float) if isinstance(default, float) else type(default)
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (isinstance(value, (int, float)) and not 0 <= value < 1e18)
        ):
            raise ValueError(f"{item.name} is {str(value)[:60]!r}")
    return record


TABLE_SECTIONS = ("run", "source", "extrapolate", "trust", "select", "report")
"""Sections of the settings that have a meaning for scores from tables with images."""


def extrapolated_tables(records: Mapping[str, StageRecord]) -> dict[str, str]:
    """Return the tables that `raypipe extrapolate` read, by the ledger of its folder.

    The keys are embeddings, scores and score_column. Empty for the ledger of a run.
    """
    return records["extrapolate"].detail.get("tables", {}) if "extrapolate" in records else {}


def scored_by(records: Mapping[str, StageRecord], configured: str) -> str:
    """Return the name of the score in `scores/`; that of tables is the name of their column."""
    return str(records["extrapolate"].detail.get("score") or configured)


def without_images(records: Mapping[str, StageRecord]) -> bool:
    """Return whether the scores were extrapolated from tables, and no images were attached."""
    return bool(extrapolated_tables(records)) and "index" not in records


def injected_noise(records: Mapping[str, StageRecord]) -> LabelNoise | None:
    """Return the label noise that the ledger says was injected; None without any."""
    return label_noise_of(records["index"].detail) if "index" in records else None


def label_noise_of(index: Mapping[str, Any]) -> LabelNoise | None:
    """Return the label noise that the JSON of an index states; None without any."""
    noise = index.get("inject_noise")
    return LabelNoise(float(noise["share"]), int(noise["seed"])) if noise else None


def fingerprint(*parts: Any) -> str:
    """Return a short hash of anything that JSON can represent."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def content_hash(names: Iterable[str]) -> str:
    """Return a short hash of a set of names."""
    digest = hashlib.blake2b(digest_size=8)
    for item in sorted(names):
        digest.update(item.encode() + b"\0")
    return digest.hexdigest()


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
