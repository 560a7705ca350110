"""`raypipe extrapolate`: from two tables to scores."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import (
    ConfigError,
    RunError,
)
from raypipe.pipeline import advance, driver_progress, errors_of_storage, log_file
from raypipe.progress import Progress
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import extrapolated_tables
from raypipe.runs.run import Run

MORE_THAN_TABLES = {
    "gnn-published": "the graph of a whole source in memory",
    "proxy": "what a proxy says of each sample",
}
"""What extrapolators need that `extrapolate` does not have."""


def extrapolate(
    config: Config,
    scores: str,
    column: str,
    *,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Score the embeddings in tables at `source.uri` from the scores of some of them, in `column` of tables at `scores`.

    Writes into the folder `run`; `raypipe.tables.stage` says what. Returns its `summary.json`. Raises ConfigError for a method that
    cannot do this, SourceError for tables that cannot be used, RunError where the folder holds something else or is in use.
    """
    with errors_of_storage(config.run):
        return _extrapolate(config, scores, column, progress or Progress(verbose=verbose), verbose)


def _extrapolate(
    config: Config, scores: str, column: str, progress: Progress, verbose: bool
) -> dict[str, Any]:
    run, uri = Run(config.run), config.source.uri
    method = config.extrapolate.method
    if method in MORE_THAN_TABLES:
        raise ConfigError(
            f"method {method} needs {MORE_THAN_TABLES[method]}; use another, such as gnn or knn-published"
        )
    for given in (uri, scores):
        if (storage.filesystem(run.uri)[1] + "/").startswith(
            storage.filesystem(given)[1].rstrip("/") + "/"
        ):
            raise ConfigError(
                f"{run.uri}: the output cannot be within {given}; give a folder elsewhere"
            )
    there = storage.names(run.uri)
    ours = (
        extrapolated_tables(run.ledger())
        if "run.json" in there
        else there <= {"driver.json", "logs"}
    )
    if not ours:
        raise RunError(
            f"{run.uri}: there is something else here, such as {min(there)}; give a new folder"
        )
    from raypipe.tables.stage import TableStage

    stage, context = TableStage(uri, scores, column), Context(config, run, progress, verbose)
    with Lease(run) as lease, log_file(run, verbose), closing(context):
        records = run.ledger() if run.exists() else {}
        lease.about = partial(driver_progress, progress, records)
        advance(stage, context, records)
    return storage.read_json(run.table_summary)
