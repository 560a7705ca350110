"""Find and read keep-list files, and relate their rows to the fragments of the source."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.errors import ConfigError, RunError
from raypipe.runs.keep_files import keep_file
from raypipe.runs.ledger import content_hash, without_images
from raypipe.runs.run import Run
from raypipe.runs.snapshots import file_uri, load_snapshot, score_shards
from raypipe.sources import Fragment, Source

COLUMNS = ("sample_id", "label", "score", "weight")
"""Columns to read of a keep-list. `weight` exists if its strategy gives weights."""
BATCH_ROWS = 1 << 16
"""Rows to read at a time."""


def find_keep_list(run: Run, keep: float | None, snapshot: str | None = None) -> str:
    """Return the URI of a keep-list of a run.

    Parameters
    ----------
    run : Run
        The run.
    keep : float or None
        Fraction of the list, 0 to 1. None: the only list.
    snapshot : str, optional
        Name of a snapshot. Default: the lists as they are now.

    Raises
    ------
    ConfigError
        For an invalid fraction.
    RunError
        If there is no such run, snapshot or list. The error names the available lists.
    """
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(
            f"keep: {keep!r} is not a fraction of the samples; it must be above 0 and at most 1"
        )
    run.ledger()  # raises if there is no run
    if snapshot is None:
        uris = {
            file: run.keep_list(file)
            for file in storage.names(run.keep_folder)
            if file.endswith(".parquet")
        }
    else:
        uris = {
            entry["file"]: file_uri(run, entry) for entry in load_snapshot(run, snapshot)["keep"]
        }
    available = sorted(uris)
    if keep is None and len(available) == 1:
        return uris[available[0]]
    if keep is not None and keep_file(keep) in available:
        return uris[keep_file(keep)]
    names = f"available: {', '.join(available) or 'none'}"
    if keep is None and available:
        raise RunError(f"{run.uri}: several keep-lists; {names}. Choose one by its fraction (keep)")
    problem = "no keep-list" if keep is None else f"no keep-list of fraction {keep:g}"
    if snapshot is not None:
        raise RunError(f"{run.uri}: {problem} in snapshot {snapshot}; {names}")
    command = f"raypipe select {run.uri}" + ("" if keep is None else f" --keep {keep:g}")
    raise RunError(f"{run.uri}: {problem}; {names}. Write it with `{command}`")


class KeepFile:
    """A keep-list file that is open for reading. Raises RunError if it is missing or invalid."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            self._file = storage.open_read(uri)
        except FileNotFoundError:
            raise RunError(f"{uri}: no such keep-list") from None
        try:
            self._parquet = pq.ParquetFile(self._file)
        except (pa.ArrowException, OSError) as error:
            self._file.close()
            raise RunError(f"{uri}: not a readable Parquet file ({error})") from None
        self.columns = [name for name in COLUMNS if name in self._parquet.schema_arrow.names]
        if self.columns[:3] != list(COLUMNS[:3]):
            self._file.close()
            raise RunError(
                f"{uri}: not a keep-list; columns: {', '.join(self._parquet.schema_arrow.names)}"
            )
        groups = self._parquet.metadata.num_row_groups
        rows = [self._parquet.metadata.row_group(group).num_rows for group in range(groups)]
        self._ends = np.cumsum(rows, dtype=np.int64)  # row at which each row group ends
        self._group = functools.lru_cache(maxsize=4)(self._read_group)

    def __len__(self) -> int:
        return int(self._parquet.metadata.num_rows)

    @property
    def weighted(self) -> bool:
        """Whether the samples have weights."""
        return "weight" in self.columns

    @property
    def schema(self) -> pa.Schema:
        """Schema of the columns that are read."""
        schema = self._parquet.schema_arrow
        return pa.schema([schema.field(name) for name in self.columns])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order."""
        yield from self._parquet.iter_batches(BATCH_ROWS, columns=self.columns, use_threads=False)

    def rows(self, start: int, stop: int) -> pa.Table:
        """Return rows `start` to `stop`. The last four row groups stay in memory."""
        first = int(np.searchsorted(self._ends, start, "right"))
        last = int(np.searchsorted(self._ends, stop, "left"))
        offset = int(self._ends[first - 1]) if first else 0
        table = pa.concat_tables([self._group(group) for group in range(first, last + 1)])
        return table.slice(start - offset, stop - start)

    def _read_group(self, group: int) -> pa.Table:
        return self._parquet.read_row_group(group, self.columns, use_threads=False)

    def __enter__(self) -> KeepFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


@dataclass(frozen=True)
class Located:
    """Which rows of a keep-list belong to which fragment.

    Attributes
    ----------
    rows : mapping of str to (int, int)
        First row, and the row after the last, by fragment id. Fragments without kept samples are
        left out.
    samples : int
        Number of rows.
    fingerprint : str
        Hash of ids, labels, scores and weights.
    weighted : bool
        Whether the samples have weights.
    """

    rows: Mapping[str, tuple[int, int]]
    samples: int
    fingerprint: str
    weighted: bool


def locate(run: Run, uri: str, snapshot: str | None = None) -> Located:
    """Return which rows of a keep-list belong to which fragment.

    The rows are in the order of the score shards, one shard per fragment. One pass over the list
    and the ids of the scores is therefore enough, without a join and with little memory.

    Parameters
    ----------
    run : Run
        The run.
    uri : str
        The keep-list.
    snapshot : str, optional
        Use the scores of this snapshot. Default: those in `scores/`.

    Raises
    ------
    RunError
        If the list was cut from other scores.
    """
    digest, rows, position = hashlib.blake2b(digest_size=8), dict[str, tuple[int, int]](), 0
    with KeepFile(uri) as file:
        batches = file.batches()
        ids, exhausted = pa.array([], pa.string()), False
        if snapshot is None:
            stored = storage.iter_tables(run.scores_folder, ["sample_id"], threads=storage.READERS)
        else:
            shards = score_shards(run, load_snapshot(run, snapshot))
            read = storage.ahead(
                lambda shard: storage.read_table(shard[1], ["sample_id"]), shards, run.uri
            )
            stored = ((name, table) for (name, _), table in read)
        for name, table in stored:
            while len(ids) < len(table) and not exhausted:
                batch = next(batches, None)
                exhausted = batch is None
                if batch is not None:
                    _hash(batch, digest)
                    ids = pa.concat_arrays([ids, batch.column("sample_id")])
            count = _leading(ids.slice(0, len(table)), table["sample_id"].combine_chunks())
            if count:
                rows[name.removesuffix(".parquet")] = (position, position + count)
            position, ids = position + count, ids.slice(count)
        if position != len(file):
            raise RunError(
                f"{uri}: {len(file) - position:,} of {len(file):,} samples do not match scores/: "
                "the list was cut from other scores. Cut it again with "
                f"`raypipe select {run.uri}`"
            )
        return Located(rows, len(file), digest.hexdigest(), file.weighted)


def split_gone(run: Run, uri: str, located: Located) -> tuple[Located, list[str]]:
    """Split a snapshot's keep-list into fragments that still exist and ids of all other samples.

    A fragment is named after the content of its file. If it is not in the index any more, its
    samples can no longer be read as they were.
    """
    indexed = {fragment.fragment_id for fragment in run.fragments()}
    remaining = {name: rows for name, rows in located.rows.items() if name in indexed}
    if len(remaining) == len(located.rows):
        return located, []
    with KeepFile(uri) as file:
        tables = [file.rows(*rows) for name, rows in located.rows.items() if name not in indexed]
    gone = [sample_id for table in tables for sample_id in table["sample_id"].to_pylist()]
    fingerprint = content_hash([located.fingerprint, *remaining])
    return Located(remaining, located.samples - len(gone), fingerprint, located.weighted), gone


def _leading(kept: pa.Array, ids: pa.Array) -> int:
    """Return how many of the first ids of `kept` are in `ids`, in the same order."""
    position = pc.fill_null(pc.index_in(kept, value_set=ids), -1).to_numpy(zero_copy_only=False)
    breaks = np.flatnonzero((position < 0) | (np.diff(position, prepend=-1) <= 0))
    return int(breaks[0]) if len(breaks) else len(position)


def _hash(batch: pa.RecordBatch, digest: hashlib.blake2b) -> None:
    digest.update(
        "\0".join(batch.column("sample_id").to_pylist()).encode("utf-8", "surrogateescape")
    )
    digest.update(
        pc.fill_null(batch.column("label"), -1)
        .to_numpy(zero_copy_only=False)
        .astype("<i4")
        .tobytes()
    )
    for name in batch.schema.names[2:]:
        digest.update(batch.column(name).to_numpy(zero_copy_only=False).astype("<f4").tobytes())


def ids_in_order(source: Source, fragment: Fragment) -> list[str]:
    """Return the ids of a fragment's samples in source order, including unreadable ones.

    No image is read if the format allows it.
    """
    ids: list[str] = []

    def note(sample_id: str) -> bool:
        if not ids or ids[-1] != sample_id:  # a tar calls this for every member
            ids.append(sample_id)
        return False

    for _ in source.read(fragment, note):
        pass
    if len(ids) == fragment.samples:
        return ids
    # an id occurs twice in a row
    return [sample.sample_id for sample in source.read(fragment)]


def first_positions(fragments: list[Fragment]) -> dict[str, int]:
    """Return the number of each fragment's first sample, counted from 0 in source order."""
    result, position = dict[str, int](), 0
    for fragment in fragments:
        result[fragment.fragment_id] = position
        position += fragment.samples
    return result


def check_has_images(run: Run) -> None:
    """Raise RunError if the scores were extrapolated from tables, without images."""
    if without_images(run.ledger()):
        raise RunError(
            f"{run.uri}: written by `raypipe extrapolate` from tables, without images; make a run "
            f"over the images with `raypipe attach {run.uri} --images URI --to FOLDER`"
        )
