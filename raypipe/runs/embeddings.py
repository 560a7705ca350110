"""Read embeddings as the extrapolators take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config.choices import PROXY_STATISTICS
from raypipe.runs.layout import Run

SPECIAL_ROWS = {"seed": "raypipe.seed_rows", "audit": "raypipe.audit_rows"}
"""Samples that come first in a fragment's file, in this order and each in a row group of their own; where their number stands."""


def read_special_rows(run: Run, fragment_id: str, which: str) -> pa.Table | None:
    """The samples of a fragment's embeddings drawn for the `seed` or the `audit` set, without reading the others; None without any."""
    with storage.open_read(run.path("embeddings", f"{fragment_id}.parquet")) as file:
        parquet = pq.ParquetFile(file)
        counts = {
            name: int(parquet.schema_arrow.metadata[key.encode()])
            for name, key in SPECIAL_ROWS.items()
        }
        if not counts[which]:
            return None
        # a row group without rows is not written
        return parquet.read_row_group(1 if which == "audit" and counts["seed"] else 0)


COLUMNS = ["sample_id", "label", "embedding", *PROXY_STATISTICS]


def nodes_of(table: pa.Table) -> Any:
    """Samples of a table of embeddings as the extrapolators see them; without a proxy there are no signals."""
    from raypipe.extrapolators.base import Nodes

    column = table["embedding"].combine_chunks()
    embedding = np.asarray(column.flatten(), np.float32).reshape(len(table), -1)
    label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    signals = [table[name].to_numpy() for name in PROXY_STATISTICS if name in table.column_names]
    return Nodes(embedding, label, np.stack(signals, 1) if signals else np.zeros((len(table), 0)))
