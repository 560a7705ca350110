"""`raypipe extrapolate`: from two tables to scores."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError
from raypipe.pipeline import advance, driver_progress
from raypipe.progress import Progress
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import extrapolated_tables
from raypipe.runs.log_file import log_file
from raypipe.runs.run import Run

UNSUPPORTED_METHODS = {
    "gnn-published": "the graph of a whole source in memory",
    "proxy": "the proxy's statistics of each sample",
}
"""Extrapolators that need more than tables, and what they need."""


def extrapolate(
    config: Config,
    scores: str,
    column: str,
    *,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Score all embeddings in tables, given the scores of some of them.

    Parameters
    ----------
    config : Config
        `source.uri` holds the embeddings, and `run` is the output folder; its layout is described
        in `raypipe.tables.stage`.
    scores, column : str
        File or folder of the scores, and their column.
    progress : Progress, optional
        Where to print.
    verbose : bool
        Whether Ray logs to the console.

    Returns
    -------
    dict
        `summary.json` of the output folder.

    Raises
    ------
    ConfigError
        For a method that needs more than tables, or an output folder inside the input.
    SourceError
        For tables that cannot be used.
    RunError
        If the output folder holds something else, or is in use.
    """
    with storage.errors_of_storage(config.run):
        return _extrapolate(config, scores, column, progress or Progress(verbose=verbose), verbose)


def _extrapolate(
    config: Config, scores: str, column: str, progress: Progress, verbose: bool
) -> dict[str, Any]:
    run, embeddings = Run(config.run), config.source.uri
    method = config.extrapolate.method
    if method in UNSUPPORTED_METHODS:
        raise ConfigError(
            f"method {method} needs {UNSUPPORTED_METHODS[method]}; "
            "use another method, such as gnn or knn-published"
        )
    for uri in (embeddings, scores):
        _check_not_inside(run, uri)
    _check_output_folder(run)
    from raypipe.tables.stage import TableStage

    stage = TableStage(embeddings, scores, column)
    context = Context(config, run, progress, verbose)
    with Lease(run) as lease, log_file(run, verbose), closing(context):
        records = run.ledger() if run.exists() else {}
        _check_same_tables(run, extrapolated_tables(records), stage.detail["tables"])
        lease.about = partial(driver_progress, progress, records)
        advance(stage, context, records)
    return storage.read_json(run.table_summary)


def _check_not_inside(run: Run, uri: str) -> None:
    """Raise ConfigError if the output folder is inside an input."""
    output = storage.filesystem(run.uri)[1] + "/"
    if output.startswith(storage.filesystem(uri)[1].rstrip("/") + "/"):
        raise ConfigError(
            f"{run.uri}: the output folder cannot be inside {uri}; choose a folder elsewhere"
        )


def _check_output_folder(run: Run) -> None:
    """Raise RunError unless the folder is new, or was written by the same command."""
    files = storage.names(run.uri)
    if "run.json" in files:
        reusable = bool(extrapolated_tables(run.ledger()))
    else:
        reusable = files <= {"driver.json", "logs"}
    if not reusable:
        raise RunError(
            f"{run.uri}: the folder holds something else, such as {min(files)}; choose a new folder"
        )


def _check_same_tables(run: Run, before: Mapping[str, str], tables: Mapping[str, str]) -> None:
    """Raise RunError if the folder holds scores from other tables."""
    changed = [f"{name} {before[name]}" for name in before if before[name] != tables[name]]
    if changed:
        raise RunError(
            f"{run.uri}: holds scores extrapolated from other tables ({', '.join(changed)}); "
            "choose a new folder"
        )
