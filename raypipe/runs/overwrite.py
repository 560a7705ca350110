"""Checks that protect the results of a run folder from a configuration that would replace them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raypipe import storage
from raypipe.config import Config, flat_settings
from raypipe.errors import RunError
from raypipe.runs.layout import STAGE_FOLDERS
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.text import counted, duration

REDO_SECONDS = 300.0
"""Work that takes longer than this is only repeated when the user asks for it."""
IDENTITY = ("uri", "root", "split", "config_name", "include")
"""Source settings that choose the data. With other values, a run reads another source."""
MAX_NAMED = 4
"""Changed settings that a message names."""


def check_folder(run: Run, reads_dataset: bool) -> None:
    """Raise RunError if a folder without a run holds something that a run would replace.

    Parameters
    ----------
    run : Run
        The run folder.
    reads_dataset : bool
        Whether the run would write a copy of a dataset to `source/`.
    """
    if run.exists():
        return
    written = {folder for folders in STAGE_FOLDERS.values() for folder in folders}
    written |= {"config.yaml"} | ({"source"} if reads_dataset else set())
    others = written & storage.names(run.uri)
    if others:
        raise RunError(
            f"{run.uri}: holds {', '.join(sorted(others))}, but no run (run.json is missing); a "
            "run would replace that. Give an empty or new folder (`run`)"
        )


def check_overwrite(
    run: Run,
    records: Mapping[str, StageRecord],
    config: Config,
    outdated: Sequence[str],
    code: Sequence[str] = (),
) -> None:
    """Raise RunError if a configuration would replace results that are worth keeping.

    These are finished stages of a run over another source, and more than `REDO_SECONDS` of work
    with other settings.

    Parameters
    ----------
    run : Run
        The run folder.
    records : mapping of str to StageRecord
        Its ledger.
    config : Config
        The new configuration.
    outdated : sequence of str
        Stages of the ledger that the configuration would run again or remove unasked, in order.
    code : sequence of str
        Which code from outside raypipe has changed, one phrase each.
    """
    lost = {name: records[name] for name in outdated}
    if not lost:
        return
    other = changed_source(run, config)
    if other and any(record.state == "done" for name, record in lost.items() if name != "index"):
        raise RunError(
            f"{run.uri}: holds a run over another source ({_listed(other)}); {_lost(lost)} would "
            "be lost. Give this source its own folder (`run`), or pass --overwrite to replace the "
            "run"
        )
    if sum(record.wall_seconds for record in lost.values()) > REDO_SECONDS:
        changed = [*_changes(run, config).values(), *code]
        settings = f" ({_listed(changed)})" if changed else ""
        raise RunError(
            f"{run.uri}: other settings than those of the run{settings}; {_lost(lost)} would be "
            f"lost. Restore the settings, give another folder (`run`), or pass --redo "
            f"{next(iter(lost))} to run this stage and those that depend on it again"
        )


def changed_source(run: Run, config: Config) -> list[str]:
    """Return how the source differs from that of the run, one text per setting."""
    chosen = {f"source.{key}" for key in IDENTITY}
    return [line for name, line in _changes(run, config).items() if name in chosen]


def _changes(run: Run, config: Config) -> dict[str, str]:
    """Return every setting that differs from those of the run, with a text of both values.

    Empty if the run has no readable configuration.
    """
    try:
        old = _plain_settings(run.config())
    except RunError:
        return {}
    return {
        name: f"{name} {_shown(old.get(name))} -> {_shown(value)}"
        for name, value in _plain_settings(config).items()
        if name != "run" and not name.startswith("cluster.") and old.get(name) != value
    }


def _plain_settings(config: Config) -> dict[str, Any]:
    """Return all settings by section.field; a slash at the end of a path makes no difference."""
    return {
        name: value.rstrip("/") if isinstance(value, str) else value
        for name, value in flat_settings(config.model_dump(mode="json")).items()
    }


def _shown(value: Any) -> str:
    return str(value)[:200] if value is not None else "null"


def _listed(lines: Sequence[str]) -> str:
    more = len(lines) - MAX_NAMED
    return ", ".join([*lines[:MAX_NAMED], *([f"and {more} more"] if more > 0 else [])])


def _lost(records: Mapping[str, StageRecord]) -> str:
    """Return which stages, keep-lists and time would be lost."""
    seconds = sum(record.wall_seconds for record in records.values())
    lists = len(records["select"].detail.get("lists", {})) if "select" in records else 0
    kept = f" with {counted(lists, 'keep-list')}" if lists else ""
    return f"{', '.join(records)} ({duration(seconds)} of work{kept})"
