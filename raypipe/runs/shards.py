"""Count and clean up the shards of a run folder."""

from __future__ import annotations

import pyarrow.parquet as pq

from raypipe import storage
from raypipe.runs.run import Run
from raypipe.sources import Fragment

READERS = 16
"""Footers that are read concurrently."""


def remove_stale(run: Run, fragments: list[Fragment], folders: tuple[str, ...]) -> None:
    """Delete outputs of fragments that are no longer in the index."""
    current = {fragment.fragment_id for fragment in fragments}
    for folder in folders:
        for stale in run.done(folder) - current:
            storage.delete(run.path(folder, f"{stale}.parquet"))


def count_rows(run: Run, folder: str) -> int:
    """Count the rows of all Parquet files in a folder, from their footers."""

    def rows(stem: str) -> int:
        with storage.open_read(run.path(folder, f"{stem}.parquet")) as file:
            return pq.ParquetFile(file).metadata.num_rows

    return sum(count for _, count in storage.ahead(rows, run.done(folder), run.uri, READERS))
