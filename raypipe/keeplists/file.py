"""A keep-list beside its source: where it is, which of its rows belong to which fragment, and the order of the source. No Ray."""

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
from raypipe.runs.ledger import content_hash, extrapolated_tables
from raypipe.runs.run import Run
from raypipe.runs.snapshots import file_uri, load_snapshot, score_shards
from raypipe.sources import Fragment, Source

COLUMNS = ("sample_id", "label", "score", "weight")
"""What is read of a keep-list; `weight` is there where its strategy gives weights."""
BATCH_ROWS = 1 << 16


def find_keep_list(run: Run, keep: float | None, snapshot: str | None = None) -> str:
    """URI of the run's keep-list of a fraction, or of the only one there is; with `snapshot` as it was then.

    Raises ConfigError for a fraction that is none, RunError where there is no such list (no run, no snapshot), naming those there are.
    """
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(
            f"keep: {keep!r} is not a fraction of the samples: it must be above 0 and at most 1"
        )
    run.ledger()  # says so where there is no run at all
    if snapshot is None:
        where = {
            file: run.keep_list(file)
            for file in storage.names(run.keep_folder)
            if file.endswith(".parquet")
        }
    else:
        where = {
            entry["file"]: file_uri(run, entry) for entry in load_snapshot(run, snapshot)["keep"]
        }
    there = sorted(where)
    if keep is None and len(there) == 1:
        return where[there[0]]
    if keep is not None and keep_file(keep) in there:
        return where[keep_file(keep)]
    found = (
        f"there are {', '.join(there)}"
        if len(there) > 1
        else f"there is {there[0]}"
        if there
        else "there is none"
    )
    if keep is None and there:
        raise RunError(f"{run.uri}: which keep-list? {found}; name its fraction with keep")
    wanted = "no keep-list" if keep is None else f"no keep-list of fraction {keep:g}"
    if snapshot is not None:
        raise RunError(f"{run.uri}: {wanted} in snapshot {snapshot}; {found}")
    command = f"raypipe select {run.uri}" + ("" if keep is None else f" --keep {keep:g}")
    raise RunError(f"{run.uri}: {wanted}; {found}. Make it with `{command}`")


class KeepFile:
    """A keep-list file, opened for reading. Raises RunError when it is missing or no keep-list."""

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
                f"{uri}: not a keep-list: its columns are {', '.join(self._parquet.schema_arrow.names)}"
            )
        groups = self._parquet.metadata.num_row_groups
        rows = [self._parquet.metadata.row_group(group).num_rows for group in range(groups)]
        self._ends = np.cumsum(rows, dtype=np.int64)  # row at which each row group ends
        self._group = functools.lru_cache(maxsize=4)(self._read_group)

    def __len__(self) -> int:
        return int(self._parquet.metadata.num_rows)

    @property
    def weighted(self) -> bool:
        """Whether samples have weights."""
        return "weight" in self.columns

    @property
    def schema(self) -> pa.Schema:
        """Of the columns that are read."""
        found = self._parquet.schema_arrow
        return pa.schema([found.field(name) for name in self.columns])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in order."""
        yield from self._parquet.iter_batches(BATCH_ROWS, columns=self.columns, use_threads=False)

    def rows(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop`; of the row groups around them the last four are held."""
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

    rows         fragment_id -> (first row, row after the last); fragments none of whose samples is kept are left out
    samples      rows in all
    fingerprint  hash of ids, labels, scores and weights
    weighted     whether samples have weights
    """

    rows: Mapping[str, tuple[int, int]]
    samples: int
    fingerprint: str
    weighted: bool


def locate(run: Run, uri: str, snapshot: str | None = None) -> Located:
    """Find the fragments of a keep-list's rows, in one pass over the list and the ids of `scores/`, or of the scores in a snapshot.

    The rows of a keep-list stand in the order of the score shards, one for each fragment, so nothing has to be joined or held.
    Raises RunError when the list was made from other scores than those there are.
    """
    digest, rows, position = hashlib.blake2b(digest_size=8), dict[str, tuple[int, int]](), 0
    with KeepFile(uri) as file:
        batches = file.batches()
        held, exhausted = pa.array([], pa.string()), False
        if snapshot is None:
            stored = storage.iter_tables(run.scores_folder, ["sample_id"], threads=storage.READERS)
        else:
            shards = score_shards(run, load_snapshot(run, snapshot))
            read = storage.ahead(
                lambda shard: storage.read_table(shard[1], ["sample_id"]), shards, run.uri
            )
            stored = ((name, table) for (name, _), table in read)
        for name, table in stored:
            while len(held) < len(table) and not exhausted:
                batch = next(batches, None)
                exhausted = batch is None
                if batch is not None:
                    _hash(batch, digest)
                    held = pa.concat_arrays([held, batch.column("sample_id")])
            count = _leading(held.slice(0, len(table)), table["sample_id"].combine_chunks())
            if count:
                rows[name.removesuffix(".parquet")] = (position, position + count)
            position, held = position + count, held.slice(count)
        if position != len(file):
            raise RunError(
                f"{uri}: {len(file) - position:,} of {len(file):,} samples are not where they should be in scores/: the list was "
                f"made from other scores than those there are. Make it again with `raypipe select {run.uri}`"
            )
        return Located(rows, len(file), digest.hexdigest(), file.weighted)


def without_gone(run: Run, uri: str, located: Located) -> tuple[Located, list[tuple[str, str]]]:
    """What a list of a snapshot has in fragments that are in the index still, and its other samples, each with the reason.

    A fragment is named after the content of its file: one that is not in the index cannot be read as it was.
    """
    there = {fragment.fragment_id for fragment in run.fragments()}
    left = {name: rows for name, rows in located.rows.items() if name in there}
    if len(left) == len(located.rows):
        return located, []
    with KeepFile(uri) as file:
        tables = [file.rows(*rows) for name, rows in located.rows.items() if name not in there]
    why = "its file changed or went away since the snapshot"
    gone = [(sample_id, why) for table in tables for sample_id in table["sample_id"].to_pylist()]
    fingerprint = content_hash([located.fingerprint, *left])
    return Located(left, located.samples - len(gone), fingerprint, located.weighted), gone


def _leading(kept: pa.Array, ids: pa.Array) -> int:
    """How many of the first ids of `kept` are among `ids`, in that order."""
    found = pc.fill_null(pc.index_in(kept, value_set=ids), -1).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((found < 0) | (np.diff(found, prepend=-1) <= 0))
    return int(wrong[0]) if len(wrong) else len(found)


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
    """Ids of a fragment's samples, unreadable ones too, in the order of the source; no image is read where the format allows it."""
    ids: list[str] = []

    def note(sample_id: str) -> bool:
        if not ids or ids[-1] != sample_id:  # a tar asks again for every member
            ids.append(sample_id)
        return False

    for _ in source.read(fragment, note):
        pass
    if len(ids) == fragment.samples:
        return ids
    return [sample.sample_id for sample in source.read(fragment)]  # an id that comes twice in a row


def first_positions(fragments: list[Fragment]) -> dict[str, int]:
    """Number of each fragment's first sample, where all samples of the source are numbered from 0 in its order."""
    result, position = dict[str, int](), 0
    for fragment in fragments:
        result[fragment.fragment_id] = position
        position += fragment.samples
    return result


def check_has_images(run: Run) -> None:
    """Raise RunError where the scores were extrapolated from tables: there is no source to take images from."""
    if extrapolated_tables(run.ledger()):
        raise RunError(
            f"{run.uri}: was made by `raypipe extrapolate`, from tables; there are no images to export. See raypipe.KeepList"
        )
