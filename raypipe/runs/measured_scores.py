"""Read the measured scores of the seed set and the audit set."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.runs.run import Run
from raypipe.runs.shards import count_rows

MEASURED_FOLDERS = {"seed": "measured", "audit": "measured/audit"}
BY_PROXY = "{}_by_proxy"
"""Column of the scores that each proxy gave, float32 [proxies], with cross-fitting. NaN for the
proxy that was trained on the sample's part."""
GIVEN_SCORES = "scored.parquet"
"""File in `extrapolator/` of scored samples from tables (`raypipe.tables.stage`), which replace the
seed set."""


def measured_scores(run: Run, score: str, which: str) -> dict[str, float]:
    """Return the measured scores of the "seed" or the "audit" set by id.

    Empty if the score was not measured there.
    """
    result: dict[str, float] = {}
    for _, table in storage.iter_tables(run.path(MEASURED_FOLDERS[which])):
        if score in table.column_names:
            result.update(
                zip(table["sample_id"].to_pylist(), table[score].to_pylist(), strict=True)
            )
    return result


def scores_by_proxy(run: Run, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and the scores by each proxy, of seed set and audit set.

    Returns
    -------
    numpy.ndarray
        Labels, int64 [n].
    numpy.ndarray
        Scores, float32 [n, proxies]; NaN for the proxy that was trained on the sample's part. There
        are no rows if each sample was scored by one proxy only.
    """
    column, labels, values = BY_PROXY.format(score), [], []
    for folder in MEASURED_FOLDERS.values():
        for _, table in storage.iter_tables(run.path(folder)):
            if column in table.column_names and len(table):
                labels.append(table["label"].fill_null(-1).to_numpy().astype(np.int64))
                values.append(storage.matrix_of(table[column]))
    if not values:
        return np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
    return np.concatenate(labels), np.concatenate(values)


def count_measured(run: Run) -> int:
    """Count the measured samples of the seed set, or the scored samples of tables."""
    if GIVEN_SCORES in storage.names(run.extrapolator_folder):
        with storage.open_read(run.given_scores) as file:
            return pq.ParquetFile(file).metadata.num_rows
    return count_rows(run, MEASURED_FOLDERS["seed"])


def every_measured_score(run: Run, score: str) -> dict[str, float]:
    """Return the measured scores of seed set and audit set by id."""
    return measured_scores(run, score, "seed") | measured_scores(run, score, "audit")
