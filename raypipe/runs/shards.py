"""Count and clean up the shards of a run folder."""

from __future__ import annotations

import pyarrow.parquet as pq

from raypipe import storage
from raypipe.runs.layout import Run
from raypipe.sources import Fragment

READERS = 16
"""Footers read at a time."""


def remove_stale(run: Run, fragments: list[Fragment], folders: tuple[str, ...]) -> None:
    """Delete outputs of fragments that are no longer in the index: files that changed or went away."""
    current = {fragment.fragment_id for fragment in fragments}
    for folder in folders:
        for stale in run.done(folder) - current:
            storage.delete(run.path(folder, f"{stale}.parquet"))


def count_rows(run: Run, folder: str) -> int:
    """Rows in all Parquet files of a folder, from their footers."""

    def rows(stem: str) -> int:
        with storage.open_read(run.path(folder, f"{stem}.parquet")) as file:
            return pq.ParquetFile(file).metadata.num_rows

    return sum(count for _, count in storage.ahead(rows, run.done(folder), run.uri, READERS))
