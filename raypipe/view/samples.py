"""The scored samples of a run as columns: one number per sample and column, and ids on disk."""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.errors import RunError
from raypipe.report.label_doubt import doubt_ranks, stored_doubt
from raypipe.runs.embeddings import SPECIAL_ROWS
from raypipe.runs.run import Run
from raypipe.runs.score_stream import read_embedding_columns
from raypipe.selection.hashing import IdSet, string_array

REST, SEED, AUDIT = 0, 1, 2
"""Sets that a sample can be in."""


class Ids:
    """Sample ids by row, in a temporary file that is mapped into memory.

    The file has no name, so it disappears with the process.
    """

    def __init__(self, shards: Iterator[pa.Array]) -> None:
        schema = pa.schema([("sample_id", pa.string())])
        descriptor, path = tempfile.mkstemp(prefix="raypipe-view-")
        try:
            starts = [0]
            with os.fdopen(descriptor, "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for ids in shards:
                    writer.write_batch(pa.record_batch([ids], schema=schema))
                    starts.append(starts[-1] + len(ids))
            self._batches = pa.ipc.open_file(pa.memory_map(path))
        finally:
            os.unlink(path)
        self.starts = np.array(starts, np.int64)

    def of_shard(self, shard: int) -> pa.Array:
        """Return the ids of a shard."""
        return self._batches.get_batch(shard).column(0)

    def shard_of(self, row: int) -> int:
        """Return the number of the shard that holds a row."""
        return int(np.searchsorted(self.starts, row, "right")) - 1

    def of_rows(self, rows: np.ndarray) -> list[str]:
        """Return the ids of some rows, in their order."""
        result = np.empty(len(rows), object)
        shards = np.searchsorted(self.starts, rows, "right") - 1
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            inside = pa.array(rows[places] - self.starts[shard])
            result[places] = self.of_shard(shard).take(inside).to_pylist()
        return result.tolist()

    def containing(self, text: str) -> np.ndarray:
        """Return which ids contain a text, ignoring case, bool [n]."""
        found = np.zeros(int(self.starts[-1]), bool)
        for shard, (start, stop) in enumerate(itertools.pairwise(self.starts.tolist())):
            matches = pc.match_substring(self.of_shard(shard), text, ignore_case=True)
            found[start:stop] = matches.to_numpy(zero_copy_only=False)
        return found

    def find(self, ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
        """Return which rows have one of some ids, bool [n], and the ids that no row has."""
        wanted = IdSet(ids)
        found = np.zeros(int(self.starts[-1]), bool)
        for shard, start in enumerate(self.starts[:-1].tolist()):
            found[start + wanted.find(self.of_shard(shard))] = True
        return found, wanted.ids.filter(pa.array(~wanted.met))


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples that have a score, in the order of the score shards.

    Attributes
    ----------
    run : Run
        The run.
    names : tuple of str
        Class names.
    shards : list of str
        Names of the fragments.
    ids : Ids
        Sample ids.
    score, lower, upper : numpy.ndarray
        The score and its interval, float32 [n].
    label : numpy.ndarray
        Class index, int32 [n]; -1 without a label.
    measured : numpy.ndarray
        Whether the score was measured, bool [n].
    drawn : numpy.ndarray
        REST, SEED or AUDIT, uint8 [n].
    doubt_rank : numpy.ndarray
        Rank among the labels to check, from 1, int32 [n]; 0 for samples that are not in the list.
    embedded : bool
        Whether the run has embeddings. Without them, sets and ranks are not known.
    """

    run: Run
    names: tuple[str, ...]
    shards: list[str]
    ids: Ids
    score: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    label: np.ndarray
    measured: np.ndarray
    drawn: np.ndarray
    doubt_rank: np.ndarray
    embedded: bool

    @classmethod
    def read(cls, run: Run) -> Samples:
        """Read scores and proxy statistics, not embeddings.

        Raises
        ------
        RunError
            If there are no scores, or `embeddings/` does not hold the same samples.
        """
        columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("score", "lower", "upper", "label", "measured", "drawn", "doubt")
        }
        shards = list[str]()
        embedded = bool(run.done("embeddings"))

        def ids_of_shards() -> Iterator[pa.Array]:
            tables = storage.iter_tables(run.scores_folder, threads=storage.READERS)
            for file, table in tables:
                shards.append(file.removesuffix(".parquet"))
                ids = string_array(table["sample_id"])
                for name, values in _score_columns(table).items():
                    columns[name].append(values)
                drawn, doubt = (
                    _statistics(run, file, ids)
                    if embedded
                    else (np.zeros(len(ids), np.uint8), np.full(len(ids), np.nan, np.float32))
                )
                columns["drawn"].append(drawn)
                columns["doubt"].append(doubt)
                yield ids

        ids = Ids(ids_of_shards())
        if not ids.starts[-1]:
            raise RunError(f"{run.scores_folder}: no scores here; rerun `raypipe run`")
        joined = {name: np.concatenate(parts) for name, parts in columns.items()}
        rank = doubt_ranks(joined.pop("doubt"))
        names = run.classes().names
        return cls(run, names, shards, ids, **joined, doubt_rank=rank, embedded=embedded)

    def __len__(self) -> int:
        return len(self.score)

    @functools.cached_property
    def class_counts(self) -> dict[int, int]:
        """Samples by class index; -1: without a label."""
        labels, counts = np.unique(self.label, return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    @functools.cache  # noqa: B019  a process serves one run
    def order(self, sort: str) -> np.ndarray:
        """Return all rows in an order of `raypipe.view.query.SORTS`, int32 [n]."""
        if sort == "source":
            return np.arange(len(self), dtype=np.int32)
        last = np.iinfo(np.int32).max
        key = {
            "lowest": lambda: self.score,
            "highest": lambda: -self.score,
            "uncertain": lambda: self.lower - self.upper,
            "labels": lambda: np.where(self.doubt_rank, self.doubt_rank, last),
        }[sort]()
        return np.argsort(key, kind="stable").astype(np.int32)


def _score_columns(table: pa.Table) -> dict[str, np.ndarray]:
    numbers = {
        name: table[name].to_numpy().astype(np.float32) for name in ("score", "lower", "upper")
    }
    label = table["label"].fill_null(-1).to_numpy().astype(np.int32)
    measured = table["measured"].fill_null(False).to_numpy()
    return {**numbers, "label": label, "measured": measured}


def _statistics(run: Run, file: str, ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return `drawn` and the doubt about the label of each sample of a shard, float32."""
    columns = ["sample_id", "label", "prediction", "margin"]
    table = read_embedding_columns(run, file, columns)
    if not string_array(table["sample_id"]).equals(ids):
        raise RunError(
            f"{run.uri}: embeddings/{file} and scores/{file} hold different samples; "
            "rerun `raypipe run`"
        )
    metadata: dict[bytes, Any] = table.schema.metadata or {}
    seed, audit = (int(metadata.get(SPECIAL_ROWS[name].encode(), 0)) for name in ("seed", "audit"))
    drawn = np.full(len(table), REST, np.uint8)
    drawn[:seed] = SEED
    drawn[seed : seed + audit] = AUDIT
    return drawn, stored_doubt(table["label"], table)
