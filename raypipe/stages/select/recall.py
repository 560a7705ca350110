"""The recall of each class on samples that the proxy was not trained on, for `select.quotas`."""

from __future__ import annotations

import numpy as np

from raypipe import storage
from raypipe.errors import ConfigError
from raypipe.runs.ledger import extrapolated_tables
from raypipe.runs.run import Run
from raypipe.runs.score_stream import read_embedding_columns
from raypipe.sources.id_sampling import in_sample


def held_out_recall(run: Run) -> tuple[float, ...]:
    """Return (hits + 1) / (samples + 2) of each class.

    With cross-fitting, `prediction` in `embeddings/` is by proxies that were not trained on the
    sample, and all samples count. Otherwise those outside the seed set do. By the 1 and the 2
    (Laplace), no class counts as recognised without error, so none loses all samples.

    Returns
    -------
    tuple of float
        NaN for a class without such samples.

    Raises
    ------
    ConfigError
        When the scores came from tables, without predictions.
    """
    if extrapolated_tables(run.ledger()):
        raise ConfigError(
            "select.quotas: recall needs the proxy's predictions, which scores from tables do not "
            "have; use equal or proportional"
        )
    config, classes = run.config(), len(run.classes().names)
    trained_on = None
    if not config.proxy.cross_fits:
        trained_on = in_sample(config.seed.fraction, config.seed.seed)
    hits, counts = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    columns = ["label", "prediction"] + ["sample_id"] * (trained_on is not None)
    files = sorted(
        file for file in storage.names(run.embeddings_folder) if file.endswith(".parquet")
    )
    for _, table in storage.ahead(
        lambda file: read_embedding_columns(run, file, columns), files, run.uri
    ):
        label = table["label"].fill_null(-1).to_numpy()
        counted = label >= 0
        if trained_on is not None:
            counted &= ~np.array(
                [trained_on(name) for name in table["sample_id"].to_pylist()], bool
            )
        hit = counted & (table["prediction"].to_numpy() == label)
        counts += np.bincount(label[counted], minlength=classes)
        hits += np.bincount(label[hit], minlength=classes)
    recall = np.where(counts > 0, (hits + 1) / (counts + 2), np.nan)
    return tuple(recall.tolist())
