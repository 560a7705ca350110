"""Read embeddings as input of the extrapolators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config.choices import PROXY_STATISTICS
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from raypipe.extrapolators.base import Nodes

SPECIAL_ROWS = {"seed": "raypipe.seed_rows", "audit": "raypipe.audit_rows"}
"""Sets whose samples come first in a fragment's file, in this order, each set in a row group of its
own; and the metadata key of their number."""


def read_special_rows(run: Run, fragment_id: str, which: str) -> pa.Table | None:
    """Read only the embeddings of a fragment that belong to the "seed" or the "audit" set.

    None if there are none.
    """
    with storage.open_read(run.embedding_shard(fragment_id)) as file:
        parquet = pq.ParquetFile(file)
        counts = {
            name: int(parquet.schema_arrow.metadata[key.encode()])
            for name, key in SPECIAL_ROWS.items()
        }
        if not counts[which]:
            return None
        # a row group without rows is not written
        return parquet.read_row_group(1 if which == "audit" and counts["seed"] else 0)


def in_second_view(table: pa.Table, views: pa.Table) -> pa.Table:
    """Return the samples that have a second embedding, with it in place of the first.

    Parameters
    ----------
    table
        Rows of a fragment's embeddings.
    views
        The fragment's second embeddings, see `raypipe.runs.cross_fit`.
    """
    row = {sample_id: index for index, sample_id in enumerate(views["sample_id"].to_pylist())}
    rows = [row.get(sample_id, -1) for sample_id in table["sample_id"].to_pylist()]
    table = table.filter(pa.array([index >= 0 for index in rows], pa.bool_()))
    second = views["embedding"].take(pa.array([index for index in rows if index >= 0], pa.int64()))
    return table.set_column(table.column_names.index("embedding"), "embedding", second)


COLUMNS = ["sample_id", "label", "embedding", *PROXY_STATISTICS]


def nodes_of(table: pa.Table) -> Nodes:
    """Convert a table of embeddings; without a proxy there are no proxy statistics."""
    from raypipe.extrapolators.base import Nodes

    column = table["embedding"].combine_chunks()
    embedding = np.asarray(column.flatten(), np.float32).reshape(len(table), -1)
    label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    statistics = [table[name].to_numpy() for name in PROXY_STATISTICS if name in table.column_names]
    stacked = np.stack(statistics, 1) if statistics else np.zeros((len(table), 0))
    return Nodes(embedding, label, stacked)
