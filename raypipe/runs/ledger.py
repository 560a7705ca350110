"""The ledger of a run, `run.json`: state, fingerprint and cost of every stage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from raypipe.sources.noise import LabelNoise

FORMAT = 1
"""Version of the layout; a run of another version is refused, not guessed at."""


@dataclasses.dataclass
class StageRecord:
    """What the ledger says of one stage. Seconds add up over interrupted attempts; detail is the stage's own."""

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


def checked_record(record: StageRecord) -> StageRecord:
    """The record, where every field has the type and range it should. Raises ValueError naming the first that has not."""
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


def tables_of(records: Mapping[str, StageRecord]) -> dict[str, str]:
    """What `raypipe extrapolate` made a folder from (embeddings, scores, score_column), by its ledger; empty for a run."""
    return records["extrapolate"].detail.get("tables", {}) if "extrapolate" in records else {}


def noise_of(records: Mapping[str, StageRecord]) -> LabelNoise | None:
    """How labels of a run were replaced for a rehearsal, by its ledger; None where they were not."""
    return label_noise_in(records["index"].detail) if "index" in records else None


def label_noise_in(about: Mapping[str, Any]) -> LabelNoise | None:
    found = about.get("inject_noise")
    return LabelNoise(float(found["share"]), int(found["seed"])) if found else None


def fingerprint(*parts: Any) -> str:
    """A short hash of anything JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def content_hash(names: Iterable[str]) -> str:
    """A short hash of a set of names."""
    digest = hashlib.blake2b(digest_size=8)
    for item in sorted(names):
        digest.update(item.encode() + b"\0")
    return digest.hexdigest()


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
