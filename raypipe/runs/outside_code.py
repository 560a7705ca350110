"""What the ledger of a run records about code from outside raypipe.

Readers show it without importing anything. The ledger can come from anybody, so every value is
checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raypipe.config.choices import DIFFICULTIES
from raypipe.runs.ledger import StageRecord

FIELD = "code"
"""Where `StageRecord.detail` has it."""


def recorded_code(record: StageRecord | None) -> list[dict[str, Any]]:
    """Return the code of a stage: for each part setting, name, hash, options and texts."""
    items = record.detail.get(FIELD, []) if record is not None else []
    return [
        item
        for item in (items if isinstance(items, list) else [])
        if isinstance(item, dict)
        and all(isinstance(item.get(key), str) for key in ("setting", "name", "hash"))
        and isinstance(item.get("options"), dict)
    ]


def all_code(records: Mapping[str, StageRecord]) -> Iterable[dict[str, Any]]:
    """Yield the code of all stages."""
    for record in records.values():
        yield from recorded_code(record)


def is_difficulty(score: str, records: Mapping[str, StageRecord]) -> bool:
    """Return whether a high score means a hard sample.

    Of a score from outside raypipe, this is what it stated when it was measured.
    """
    return score in DIFFICULTIES or any(
        item["name"] == score and item.get("high_is_hard") is True
        for item in recorded_code(records.get("measure"))
    )


def code_text(item: Mapping[str, Any]) -> str:
    """Return a line about code, as it is recorded: setting, name, summary, package and options."""
    options = ", ".join(f"{name} {value}" for name, value in sorted(item["options"].items()))
    details = [str(item.get("package") or ""), f"code {item['hash']}", options]
    summary = f": {item['summary']}" if item.get("summary") else ""
    return f"{item['setting']} {item['name']}{summary} ({'; '.join(filter(None, details))})"
