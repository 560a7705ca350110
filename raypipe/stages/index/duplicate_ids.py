"""Duplicate ids: of samples that share an id, the first counts and the others are rejected.

Ids that are made of paths are unique. Ids from the data's owner (`Source.ids_can_repeat`) can occur
twice, in one file or in two. Within a fragment, duplicates show when it is read. Across fragments
they are found here, in two passes of tasks, so that neither the driver nor a worker ever holds all
ids:

1. for a group of fragments, the 128-bit hash of every id, sorted: `duplicates/ids/*.parquet`,
   20 bytes an id;
2. for a range of hash values, those that occur in more than one fragment.

The result is written by fragment, `duplicates/of/<fragment>.parquet`, where the tasks that read the
fragment look it up. Equal hashes count as equal ids: two of 10^8 different ids share a hash with a
probability of 10^-23.

"First" means: in the earliest index of this run that had the sample, then in the order of the
source. So a source that grows does not turn samples that have a score into duplicates. A fragment
whose duplicates change (a file with the first occurrence disappeared) is read again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import RunTasks
from raypipe.errors import RejectError
from raypipe.runs.duplicates import FIRST_OCCURRENCES, FOLDER, IDS, STATE, id_digest, read_state
from raypipe.runs.ledger import content_hash
from raypipe.runs.rejects import MIN_REJECTS
from raypipe.runs.run import Run
from raypipe.sources import Fragment, open_source

GROUP_IDS = 1_000_000
"""Ids that one task hashes, about."""
PART_IDS = 2_000_000
"""Ids that one task compares, about."""
ROW_GROUP = 16_384
"""Ids in a row group; a comparing task reads up to this many too many at each end of its range."""
FILES_AT_ONCE = 16
"""Small files that the driver reads or writes at a time."""
SCHEMA = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("fragment", pa.int32())])
"""A file of hashes: both halves of each hash, and the position of the fragment in the group."""
FOUND_SCHEMA = pa.schema([("id_hash", pa.binary(16)), ("first", pa.string())])
"""A file of duplicates: the hash of each id, and the path of the file with its first occurrence."""


class DuplicateCount(NamedTuple):
    """How many duplicates there are, and the processor seconds that were spent."""

    duplicates: int
    cpu_seconds: float


def find_duplicates(config: Config, run: Run, run_tasks: RunTasks) -> DuplicateCount:
    """Find the ids that occur in several fragments of the index.

    The memory of the driver grows with the duplicates, not with the ids.

    Raises
    ------
    RejectError
        When they are more than `source.max_reject_fraction`.
    """
    if not open_source(config.source).ids_can_repeat:
        return DuplicateCount(0, 0.0)
    fragments = [fragment for fragment in run.fragments() if fragment.samples]
    content, state = content_hash(fragment.fragment_id for fragment in fragments), read_state(run)
    if state.get("content") == content:
        return DuplicateCount(state["duplicates"], 0.0)
    generation = state.get("generation", -1) + 1
    search = _DuplicateSearch(config, run, run_tasks)
    search.hash_new_fragments(fragments, generation)
    hash_files = _read_hash_files(run)
    by_appearance = _order_of_appearance(fragments, hash_files)
    ranks = _ranks(by_appearance, hash_files)
    rows = search.compare(by_appearance, ranks)
    _write_duplicates(run, by_appearance, rows)
    _delete_unused(run, ranks)
    storage.write_json(
        run.path(FOLDER, STATE),
        {"content": content, "generation": generation, "duplicates": len(rows)},
    )
    return DuplicateCount(len(rows), search.cpu_seconds)


HashFiles = dict[str, list[str]]
"""Files of hashes by name, each with its fragments in the order of its column `fragment`.

The name begins with the generation: the number of the index of this run that had the fragments
first.
"""


def _read_hash_files(run: Run) -> HashFiles:
    """Read which fragments the files of hashes have."""

    def fragments_of(file: str) -> list[str]:
        with storage.open_read(run.path(IDS, f"{file}.parquet")) as stored:
            return json.loads(pq.read_schema(stored).metadata[b"raypipe"])

    files = sorted(run.done(IDS))
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        return dict(zip(files, threads.map(fragments_of, files), strict=True))


def _order_of_appearance(fragments: Sequence[Fragment], files: HashFiles) -> list[Fragment]:
    """Sort fragments by their generation; those of one generation stay in the source's order."""
    generation: dict[str, int] = {}
    for file in sorted(files, reverse=True):  # a fragment in several files has the earliest
        generation.update(dict.fromkeys(files[file], int(file[:5])))
    return sorted(fragments, key=lambda fragment: generation[fragment.fragment_id])


def _ranks(by_appearance: Sequence[Fragment], files: HashFiles) -> dict[str, list[int]]:
    """Return the rank of every fragment of every file in the order of appearance.

    Fragments that are no longer in the source have rank -1.
    """
    rank = {fragment.fragment_id: number for number, fragment in enumerate(by_appearance)}
    return {file: [rank.get(name, -1) for name in names] for file, names in files.items()}


def _delete_unused(run: Run, ranks: Mapping[str, Sequence[int]]) -> None:
    """Delete files of hashes whose fragments are all gone."""
    for file, of_fragments in ranks.items():
        if max(of_fragments, default=-1) < 0:
            storage.delete(run.path(IDS, f"{file}.parquet"))


@dataclass(frozen=True)
class HashGroup:
    """A group of fragments whose hashes are in one file, and the name of the file."""

    file: str
    fragments: list[Fragment]


@dataclass(frozen=True)
class HashRange:
    """The `number`-th of `of` equal ranges of hash values."""

    number: int
    of: int

    @property
    def low(self) -> int:
        """The first value of the upper 64 bits."""
        return self.number * 2**64 // self.of

    @property
    def high(self) -> int:
        """The last value of the upper 64 bits."""
        return (self.number + 1) * 2**64 // self.of - 1


@dataclass(frozen=True)
class Repeats:
    """The repeated ids in a range of hash values.

    Attributes
    ----------
    rows : bytes
        uint64 [n, 4]: both halves of the hash, the rank of the fragment, and the rank of the
        fragment with the first occurrence.
    cpu_seconds : float
        Processor time of the task.
    """

    rows: bytes
    cpu_seconds: float

    def as_array(self) -> np.ndarray:
        """Return the rows."""
        return np.frombuffer(self.rows, np.uint64).reshape(-1, 4)


class _DuplicateSearch:
    """Runs both passes in tasks.

    Attributes
    ----------
    cpu_seconds : float
        Processor seconds of the tasks so far.
    """

    def __init__(self, config: Config, run: Run, run_tasks: RunTasks) -> None:
        self._config, self._run, self._run_tasks = config, run, run_tasks
        self.cpu_seconds = 0.0

    def hash_new_fragments(self, fragments: Sequence[Fragment], generation: int) -> None:
        """Write the hashes of fragments that no file has."""
        hashed = {name for names in _read_hash_files(self._run).values() for name in names}
        new = [fragment for fragment in fragments if fragment.fragment_id not in hashed]
        function = functools.partial(_write_hashes, self._config, self._run.uri)
        self._run_tasks(list(_groups(new, generation)), function, self._add_seconds)

    def _add_seconds(self, seconds: float) -> None:
        self.cpu_seconds += seconds

    def compare(
        self, by_appearance: Sequence[Fragment], ranks: Mapping[str, Sequence[int]]
    ) -> np.ndarray:
        """Return the repeats as rows of `Repeats`, sorted by fragment and hash.

        Raises RejectError as soon as they are too many.
        """
        samples = sum(fragment.samples for fragment in by_appearance)
        parts = max(1, -(-samples // PART_IDS))
        found = [np.zeros((0, 4), np.uint64)]

        def collect(result: Repeats) -> None:
            self._add_seconds(result.cpu_seconds)
            found.append(result.as_array())
            self._check(found, by_appearance, samples)

        self._run_tasks(
            [HashRange(number, parts) for number in range(parts)],
            functools.partial(_find_repeats, self._run.uri, ranks),
            collect,
        )
        rows = np.concatenate(found)
        return rows[np.lexsort((rows[:, 1], rows[:, 0], rows[:, 2]))]

    def _check(
        self, found: Sequence[np.ndarray], by_appearance: Sequence[Fragment], samples: int
    ) -> None:
        """Raise RejectError when there are too many repeats."""
        count, fraction = sum(map(len, found)), self._config.source.max_reject_fraction
        if count <= fraction * samples or count < (MIN_REJECTS if fraction else 1):
            return
        _, _, rank, first_rank = next(rows[0] for rows in found if len(rows))
        raise RejectError(
            f"at least {count:,} of {samples:,} samples repeat the id of an earlier sample, and "
            f"source.max_reject_fraction allows {100 * fraction:g} %. Some ids of "
            f"{by_appearance[int(rank)].path} are also in {by_appearance[int(first_rank)].path}. "
            "Choose unique ids (source.id_column), exclude files (source.include), or raise "
            "source.max_reject_fraction"
        )


def _groups(fragments: Sequence[Fragment], generation: int) -> Iterator[HashGroup]:
    """Group consecutive fragments with about GROUP_IDS samples."""
    group: list[Fragment] = []
    count = 0
    for position, fragment in enumerate(fragments):
        group.append(fragment)
        count += fragment.samples
        if count >= GROUP_IDS or position == len(fragments) - 1:
            content = content_hash(item.fragment_id for item in group)
            yield HashGroup(f"{generation:05d}-{content}", group)
            group, count = [], 0


def _write_hashes(config: Config, run_uri: str, group: HashGroup) -> float:
    """Write the hashes of the ids of a group. Runs in a task. Returns processor seconds."""
    from raypipe.distributed.usage import Stopwatch

    watch, run, source = Stopwatch(), Run(run_uri), open_source(config.source)
    hashes, positions = [], []
    for position, fragment in enumerate(group.fragments):
        digests = set[bytes]()

        def note(sample_id: str, digests: set[bytes] = digests) -> bool:
            digests.add(id_digest(sample_id))
            return False  # so that no image is read

        for _ in source.read(run.with_members(fragment), note):
            pass
        hashes.append(np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2))
        positions.append(np.full(len(digests), position, np.int32))
    halves, fragment_column = np.concatenate(hashes).astype(np.uint64), np.concatenate(positions)
    order = np.lexsort((fragment_column, halves[:, 1], halves[:, 0]))
    table = pa.table([halves[order, 0], halves[order, 1], fragment_column[order]], schema=SCHEMA)
    names = json.dumps([fragment.fragment_id for fragment in group.fragments])
    storage.write_table(
        run.path(IDS, f"{group.file}.parquet"),
        table.replace_schema_metadata({"raypipe": names}),
        compression="none",
        row_group_size=ROW_GROUP,
        dictionary=False,
    )
    return watch.lap()


def _find_repeats(run_uri: str, ranks: Mapping[str, Sequence[int]], part: HashRange) -> Repeats:
    """Find the occurrences in a range of hash values that are not the first. Runs in a task."""
    from raypipe.distributed.usage import Stopwatch

    watch = Stopwatch()
    pieces = [np.zeros((0, 3), np.uint64)]
    for file, of_fragments in ranks.items():
        if max(of_fragments) < 0:
            continue
        table = _range(Run(run_uri).path(IDS, f"{file}.parquet"), part.low, part.high)
        rank = np.array(of_fragments, np.int64)[table["fragment"].to_numpy()]
        columns = table["high"].to_numpy(), table["low"].to_numpy(), rank.astype(np.uint64)
        pieces.append(np.stack(columns, 1)[rank >= 0])
    rows = np.concatenate(pieces)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    repeated = np.zeros(len(rows), bool)
    repeated[1:] = (rows[1:, :2] == rows[:-1, :2]).all(1)
    # of every row, the row with the first occurrence of its hash
    first = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(rows))))
    result = np.concatenate([rows[repeated], rows[first[repeated], 2:3]], 1)
    return Repeats(result.tobytes(), watch.lap())


def _range(uri: str, low: int, high: int) -> pa.Table:
    """Read the rows of a sorted file with `low` <= column `high` <= `high`.

    Row groups outside the range are not read.
    """
    with storage.open_read(uri) as stored:
        parquet = pq.ParquetFile(stored)
        groups = []
        for group in range(parquet.metadata.num_row_groups):
            bounds = parquet.metadata.row_group(group).column(0).statistics
            if bounds is None or (bounds.max >= low and bounds.min <= high):
                groups.append(group)
        table = parquet.read_row_groups(groups, use_threads=False)
    value = table["high"].to_numpy()
    return table.filter(pa.array((value >= np.uint64(low)) & (value <= np.uint64(high))))


def _write_duplicates(run: Run, by_appearance: Sequence[Fragment], rows: np.ndarray) -> None:
    """Write the duplicates of each fragment from sorted rows of `Repeats`.

    Other outputs of a fragment are removed when its duplicates changed.
    """
    tables = _tables_by_fragment(by_appearance, rows)
    before = run.done(FIRST_OCCURRENCES)

    def update(fragment_id: str) -> None:
        file = run.path(FIRST_OCCURRENCES, f"{fragment_id}.parquet")
        new = tables.get(fragment_id)
        old = storage.read_table(file) if fragment_id in before else None
        if old is not None and new is not None and old.equals(new):
            return
        if _hashes(old) != _hashes(new):
            for folder in ("scores", "embeddings", "rejects"):
                storage.delete(run.path(folder, f"{fragment_id}.parquet"))
        if new is None:
            storage.delete(file)
        else:
            storage.write_table(file, new)

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        list(threads.map(update, sorted(before | set(tables))))


def _tables_by_fragment(by_appearance: Sequence[Fragment], rows: np.ndarray) -> dict[str, pa.Table]:
    """Return the content of each fragment's file of duplicates."""
    starts = np.searchsorted(rows[:, 2], np.unique(rows[:, 2]))
    tables = {}
    for start, stop in zip(starts, np.append(starts, len(rows))[1:], strict=True):
        part = rows[start:stop]
        hashes = [row.tobytes() for row in part[:, :2].astype(">u8")]
        first = [by_appearance[int(rank)].path for rank in part[:, 3]]
        tables[by_appearance[int(part[0, 2])].fragment_id] = pa.table(
            [pa.array(hashes, pa.binary(16)), first], schema=FOUND_SCHEMA
        )
    return tables


def _hashes(table: pa.Table | None) -> list[bytes]:
    return table["id_hash"].to_pylist() if table is not None else []
