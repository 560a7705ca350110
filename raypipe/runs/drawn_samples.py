"""Drawn samples of some fragments, `drawn/<name>.parquet`, until they are in seed shards.

A file holds the drawn samples of consecutive fragments in the canonical order, so that a seed shard
is a small range of rows in each file. Every range that one task gathers is a row group of its own,
and the statistics of the column `order` tell which row groups a task needs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import image_array, image_column
from raypipe.selection.hashing import canonical_hashes, canonical_order, hash_range

BLOCK = 128 << 10
"""Bytes of a drawn file to read at a time: a footer, or a row group of small images."""


@dataclass(frozen=True)
class DrawnSamples:
    """Usable samples of the seed set and the audit set.

    Attributes
    ----------
    ids : list of str
        Ids of n samples.
    labels : np.ndarray
        Class indices, int32 [n]; -1 for an unlabelled one.
    images : np.ndarray
        Pixels, uint8 [n, 3, size, size].
    audit : np.ndarray
        Whether a sample is in the audit set, bool [n]; else it is in the seed set.
    """

    ids: list[str]
    labels: np.ndarray
    images: np.ndarray
    audit: np.ndarray

    def take(self, rows: np.ndarray) -> DrawnSamples:
        """Return the samples at `rows`."""
        ids = [self.ids[row] for row in rows.tolist()]
        return DrawnSamples(ids, self.labels[rows], self.images[rows], self.audit[rows])


def write_drawn(
    run: Run, name: str, samples: DrawnSamples, ranges: int, statistics: dict[str, Any]
) -> None:
    """Write drawn samples in the canonical order, one row group for each range of hashes.

    Parameters
    ----------
    run, name
        The run, and the name of the file.
    samples
        The samples, in any order.
    ranges
        Number of equal ranges of hashes.
    statistics
        Stored in the metadata; `drawn_statistics` reads them.
    """
    order = canonical_order(samples.ids)
    samples = samples.take(order)
    hashes = canonical_hashes(samples.ids)
    columns = {
        "order": pa.array(hashes, pa.uint64()),
        "audit": pa.array(samples.audit, pa.bool_()),
        "sample_id": pa.array(samples.ids, pa.string()),
        "label": pa.array(samples.labels, pa.int32()),
        "image": image_column(samples.images),
    }
    table = pa.table(columns).replace_schema_metadata({"raypipe": json.dumps(statistics)})
    bounds = np.searchsorted(hash_range(hashes, ranges), np.arange(ranges + 1))
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        table.schema,
        compression="zstd",
        use_dictionary=False,
        write_statistics=["order"],
    ) as writer:
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if start < stop:
                writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
    storage.write_bytes(run.drawn_file(name), buffer.getvalue())


def drawn_statistics(run: Run, name: str) -> dict[str, Any]:
    """Read the statistics in the metadata of a drawn file."""
    with storage.open_read(run.drawn_file(name), BLOCK) as file:
        return json.loads(pq.read_schema(file).metadata[b"raypipe"])


def read_drawn(
    run: Run, names: Sequence[str], size: int, shards: int, first: int, stop: int
) -> tuple[DrawnSamples, np.ndarray]:
    """Read the samples of consecutive seed shards from all drawn files.

    Parameters
    ----------
    run, names
        The run, and the names of the files.
    size
        Side of the images, pixels.
    shards
        Number of shards, of which those from `first` up to `stop` (exclusive) are read.

    Returns
    -------
    DrawnSamples
        The samples in the canonical order.
    np.ndarray
        The shard of each, int64 [n].
    """

    def read(name: str) -> pa.Table:
        return _read_range(run, name, shards, first, stop)

    table = pa.concat_tables([part for _, part in storage.ahead(read, names, run.uri)])
    ids = table["sample_id"].to_pylist()
    samples = DrawnSamples(
        ids,
        table["label"].to_numpy(),
        image_array(table["image"], size),
        table["audit"].to_numpy(),
    ).take(canonical_order(ids))
    return samples, hash_range(canonical_hashes(samples.ids), shards)


def _read_range(run: Run, name: str, shards: int, first: int, stop: int) -> pa.Table:
    """Read the rows of one drawn file that belong to some shards."""
    with storage.open_read(run.drawn_file(name), BLOCK) as file:
        parquet = pq.ParquetFile(file)
        bounds = [
            parquet.metadata.row_group(group).column(0).statistics
            for group in range(parquet.num_row_groups)
        ]
        ends = np.array([(bound.min, bound.max) for bound in bounds], np.uint64).reshape(-1, 2)
        low, high = hash_range(ends, shards).T
        groups = np.flatnonzero((high >= first) & (low < stop)).tolist()
        if not groups:
            return parquet.schema_arrow.remove_metadata().empty_table()
        table = parquet.read_row_groups(groups, use_threads=False).replace_schema_metadata(None)
    shard = hash_range(table["order"].to_numpy(), shards)
    start, end = np.searchsorted(shard, (first, stop)).tolist()
    return table.slice(start, end - start)
