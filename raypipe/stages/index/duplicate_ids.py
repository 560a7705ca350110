"""Duplicate ids: of samples that share an id, the first counts and the others are rejected.

Ids made of paths differ; ids that the data's owner gives (`Source.ids_can_repeat`) may come twice, in one file or in two. Within
a fragment that is seen when it is read. Across fragments it is found here, in two passes of tasks, so that neither the driver nor
a worker ever holds all ids:

1. for a group of fragments, the 128-bit hash of every id, sorted: `duplicates/ids/*.parquet`, 20 bytes an id;
2. for a range of hash values, those that occur in more than one fragment.

What is found is written by fragment, `duplicates/of/<fragment>.parquet`, where the tasks that read it look. Equal hashes are taken
for equal ids: two of 10^8 different ids share one with a probability of 10^-23.

First means: in the earliest index of this run that had the sample, then in the order of the source. So a source that grows does not
turn samples that have a score into duplicates. A fragment whose duplicates change (a file with the first occurrence went away) is
read again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import RunTasks
from raypipe.errors import RejectError
from raypipe.runs.duplicates import FOLDER, FOUND, IDS, STATE, id_digest, read_state
from raypipe.runs.ledger import content_hash
from raypipe.runs.rejects import MIN_REJECTS
from raypipe.runs.run import Run
from raypipe.sources import Fragment, open_source

GROUP_IDS, PART_IDS, ROW_GROUP = 1_000_000, 2_000_000, 16_384
"""Ids hashed in one task, ids compared in one task, and ids in a row group: what a comparing task reads in vain at both ends."""
SCHEMA = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("fragment", pa.int32())])
FOUND_SCHEMA = pa.schema([("id_hash", pa.binary(16)), ("first", pa.string())])


def find_duplicates(config: Config, run: Run, run_tasks: RunTasks) -> tuple[int, float]:
    """Find what occurs twice in the fragments of the index. Returns how many duplicates there are and the processor seconds spent.

    Memory of the driver grows with the duplicates, not with the ids. Raises RejectError when they are too many.
    """
    if not open_source(config.source).ids_can_repeat:
        return 0, 0.0
    fragments = [fragment for fragment in run.fragments() if fragment.samples]
    content, state = content_hash(fragment.fragment_id for fragment in fragments), read_state(run)
    if state.get("content") == content:
        return state["duplicates"], 0.0
    generation, seconds = state.get("generation", -1) + 1, 0.0

    def spent(result: dict[str, Any]) -> None:
        nonlocal seconds
        seconds += result["cpu_seconds"]

    covered = {name for listed in _files(run).values() for name in listed}
    groups = list(
        _groups(
            [fragment for fragment in fragments if fragment.fragment_id not in covered], generation
        )
    )
    run_tasks(groups, functools.partial(_write_ids, config, run.uri), spent)
    files = _files(run)
    # in the order of the samples' first appearance: by generation, which file names begin with, then as in the source
    born = {name: int(file[:5]) for file in sorted(files, reverse=True) for name in files[file]}
    ordered = sorted(fragments, key=lambda fragment: born[fragment.fragment_id])
    rank = {fragment.fragment_id: number for number, fragment in enumerate(ordered)}
    total = sum(fragment.samples for fragment in fragments)
    parts = max(1, -(-total // PART_IDS))
    found: list[np.ndarray] = []

    def collect(result: dict[str, Any]) -> None:
        spent(result)
        found.append(np.frombuffer(result["rows"], np.uint64).reshape(-1, 4))
        count, fraction = sum(map(len, found)), config.source.max_reject_fraction
        if count > fraction * total and count >= (MIN_REJECTS if fraction else 1):
            row = next(rows[0] for rows in found if len(rows))
            raise RejectError(
                f"at least {count:,} of {total:,} samples have an id that an earlier one has, and source.max_reject_fraction allows "
                f"{100 * fraction:g} %: some of {ordered[int(row[2])].path} are also in {ordered[int(row[3])].path}. Choose ids that "
                "are unique (source.id_column), leave files out (source.include), or raise source.max_reject_fraction"
            )

    ranks = {file: [rank.get(name, -1) for name in listed] for file, listed in files.items()}
    run_tasks(
        [(part, parts) for part in range(parts)],
        functools.partial(_compare, run.uri, ranks),
        collect,
    )
    rows = np.concatenate(found) if found else np.zeros((0, 4), np.uint64)
    _write_found(run, ordered, rows[np.lexsort((rows[:, 1], rows[:, 0], rows[:, 2]))])
    for file, listed in ranks.items():
        if max(listed, default=-1) < 0:
            storage.delete(run.path(IDS, f"{file}.parquet"))
    state = {"content": content, "generation": generation, "duplicates": len(rows)}
    storage.write_json(run.path(FOLDER, STATE), state)
    return len(rows), seconds


def _files(run: Run) -> dict[str, list[str]]:
    """The files of hashes and the fragments in each, in the order of its column `fragment`."""

    def listed(file: str) -> list[str]:
        with storage.open_read(run.path(IDS, f"{file}.parquet")) as stored:
            return json.loads(pq.read_schema(stored).metadata[b"raypipe"])

    files = sorted(run.done(IDS))
    with ThreadPoolExecutor(16) as threads:
        return dict(zip(files, threads.map(listed, files), strict=True))


def _groups(fragments: list[Fragment], generation: int) -> Iterator[tuple[str, list[Fragment]]]:
    """Runs of fragments with about GROUP_IDS samples, each with the name of its file."""
    group: list[Fragment] = []
    count = 0
    for position, fragment in enumerate(fragments):
        group.append(fragment)
        count += fragment.samples
        if count >= GROUP_IDS or position == len(fragments) - 1:
            yield f"{generation:05d}-{content_hash(item.fragment_id for item in group)}", group
            group, count = [], 0


def _write_ids(config: Config, run_uri: str, unit: tuple[str, list[Fragment]]) -> dict[str, Any]:
    """Hash the ids of a group of fragments. Runs in a task."""
    from raypipe.distributed.usage import Stopwatch

    watch, run, source = Stopwatch(), Run(run_uri), open_source(config.source)
    name, group = unit
    hashes, numbers = [], []
    for number, fragment in enumerate(group):
        found = set[bytes]()

        def note(sample_id: str, found: set[bytes] = found) -> bool:
            found.add(id_digest(sample_id))
            return False  # so that no image is read

        for _ in source.read(run.with_members(fragment), note):
            pass
        hashes.append(np.frombuffer(b"".join(found), ">u8").reshape(-1, 2))
        numbers.append(np.full(len(found), number, np.int32))
    both, fragment_number = np.concatenate(hashes).astype(np.uint64), np.concatenate(numbers)
    order = np.lexsort((fragment_number, both[:, 1], both[:, 0]))
    table = pa.table([both[order, 0], both[order, 1], fragment_number[order]], schema=SCHEMA)
    listed = json.dumps([fragment.fragment_id for fragment in group])
    table = table.replace_schema_metadata({"raypipe": listed})
    storage.write_table(
        run.path(IDS, f"{name}.parquet"),
        table,
        compression="none",
        row_group_size=ROW_GROUP,
        dictionary=False,
    )
    return {"cpu_seconds": watch.lap()}


def _compare(run_uri: str, ranks: dict[str, list[int]], unit: tuple[int, int]) -> dict[str, Any]:
    """Of a range of hash values, the occurrences that are not the first: uint64 [n, 4] of hash, hash, rank, first rank. Runs in a task."""
    from raypipe.distributed.usage import Stopwatch

    watch, (part, parts) = Stopwatch(), unit
    low, high = part * 2**64 // parts, (part + 1) * 2**64 // parts - 1
    pieces = [np.zeros((0, 3), np.uint64)]
    for file, of_file in ranks.items():
        if max(of_file) < 0:
            continue
        table = _range(Run(run_uri).path(IDS, f"{file}.parquet"), low, high)
        place = np.array(of_file, np.int64)[table["fragment"].to_numpy()]
        rows = np.stack(
            [table["high"].to_numpy(), table["low"].to_numpy(), place.astype(np.uint64)], 1
        )
        pieces.append(rows[place >= 0])
    rows = np.concatenate(pieces)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    again = np.zeros(len(rows), bool)
    again[1:] = (rows[1:, :2] == rows[:-1, :2]).all(1)
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(rows))))
    result = np.concatenate([rows[again], rows[first[again], 2:3]], 1)
    return {"rows": result.tobytes(), "cpu_seconds": watch.lap()}


def _range(uri: str, low: int, high: int) -> pa.Table:
    """The rows of a sorted file whose hash begins within a range (both ends are in it); other row groups are not read."""
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


def _write_found(run: Run, ordered: list[Fragment], rows: np.ndarray) -> None:
    """Write the duplicates of each fragment, and remove outputs of fragments where they are others than before."""
    starts = np.searchsorted(rows[:, 2], np.unique(rows[:, 2]))
    tables = {}
    for start, stop in zip(starts, np.append(starts, len(rows))[1:], strict=True):
        part = rows[start:stop]
        hashes = [row.tobytes() for row in part[:, :2].astype(">u8")]
        first = [ordered[int(number)].path for number in part[:, 3]]
        tables[ordered[int(part[0, 2])].fragment_id] = pa.table(
            [pa.array(hashes, pa.binary(16)), first], schema=FOUND_SCHEMA
        )
    before = run.done(FOUND)

    def write(fragment_id: str) -> None:
        table, file = tables.get(fragment_id), run.path(FOUND, f"{fragment_id}.parquet")
        old = storage.read_table(file) if fragment_id in before else None
        if old is not None and table is not None and old.equals(table):
            return
        if (old["id_hash"].to_pylist() if old is not None else []) != (
            table["id_hash"].to_pylist() if table is not None else []
        ):
            for folder in ("scores", "embeddings", "rejects"):
                storage.delete(run.path(folder, f"{fragment_id}.parquet"))
        if table is None:
            storage.delete(file)
        else:
            storage.write_table(file, table)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(write, sorted(before | set(tables))))
