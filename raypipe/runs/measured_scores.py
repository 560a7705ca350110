"""Read the measured scores of the seed set and the audit set."""

from __future__ import annotations

import pyarrow.parquet as pq

from raypipe import storage
from raypipe.runs.layout import Run
from raypipe.runs.shards import count_rows

MEASURED_FOLDERS = {"seed": "measured", "audit": "measured/audit"}
GIVEN_SCORES = "scored.parquet"
"""Under `extrapolator/`: scored samples that were given in tables (`raypipe.tables.stage`), in place of a seed set."""


def measured_scores(run: Run, score: str, which: str) -> dict[str, float]:
    """A measured score of every sample of the `seed` or the `audit` set by id; empty where it was not measured there."""
    result: dict[str, float] = {}
    for _, table in storage.iter_tables(run.path(MEASURED_FOLDERS[which])):
        if score in table.column_names:
            result.update(
                zip(table["sample_id"].to_pylist(), table[score].to_pylist(), strict=True)
            )
    return result


def count_measured(run: Run) -> int:
    """Measured samples of the seed set, or the scored ones of a folder that was made from tables."""
    if GIVEN_SCORES in storage.names(run.path("extrapolator")):
        with storage.open_read(run.path("extrapolator", GIVEN_SCORES)) as file:
            return pq.ParquetFile(file).metadata.num_rows
    return count_rows(run, MEASURED_FOLDERS["seed"])


def every_measured_score(run: Run, score: str) -> dict[str, float]:
    """A measured score by id, of seed set and audit set."""
    return measured_scores(run, score, "seed") | measured_scores(run, score, "audit")
