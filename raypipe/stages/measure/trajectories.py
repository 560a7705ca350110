"""Trajectory scores of the seed set: each task follows some samples through all epochs.

With several parts (`proxy.parts`), a sample's trajectory is that of the proxy of its part; with
repeats (`proxy.repeats`), it has one trajectory for each, and a score of each.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.ledger import StageRecord, fingerprint
from raypipe.runs.manifests import ProxyManifest, SeedManifest
from raypipe.runs.partition import trajectory_files
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import shard_labels
from raypipe.runs.unit_result import UnitResult

BLOCK_BYTES = 16 << 20
"""Memory of one block: probabilities of all its samples at all epochs, float32; fits the cache."""

TASK_BYTES = 512 << 20
"""Bytes of the trajectory that one task reads, about.

A task has consecutive shards, so that few row groups are read twice.
"""

Rows = dict[str, np.ndarray]
"""Some rows of a trajectory file, by column; `row` ascends."""


class ShardRows(NamedTuple):
    """The rows of a seed shard in the whole seed set: from `start` up to `stop` (exclusive)."""

    shard: str
    start: int
    stop: int


def shard_rows(seed: SeedManifest) -> list[ShardRows]:
    """Return the rows of every seed shard, in order."""
    stops = np.cumsum(seed.shard_samples).tolist()
    starts = [0, *stops[:-1]]
    return [
        ShardRows(shard, start, stop)
        for shard, start, stop in zip(seed.shards, starts, stops, strict=True)
    ]


def measure_trajectories(context: Context, record: StageRecord, scores: list[str]) -> None:
    """Write `<folder>/<shard>.parquet` for every seed shard that has none.

    It holds sample_id, label and a column per score. With repeats, each has its own folder.
    """
    run, seed = context.run, SeedManifest.read(context.run)
    repeats = context.config.proxy.repeats
    folder, units = trajectory_folder(context.config, run), shard_rows(seed)
    max_rows = TASK_BYTES // _row_bytes(run, columns_of(scores))
    with context.progress.meter("trajectory", repeats * seed.samples) as meter:

        def collect(result: UnitResult) -> None:
            meter.add(result.samples)
            record.add_cost(result)

        for repeat in range(repeats):
            of_repeat = repeat_folder(folder, repeat, repeats)
            done = run.done(of_repeat)
            meter.already(sum(unit.stop - unit.start for unit in units if unit.shard in done))
            missing = [unit for unit in units if unit.shard not in done]
            function = functools.partial(
                score_shards, context.config, run.uri, of_repeat, scores, repeat=repeat
            )
            context.run_tasks(_consecutive(missing, max_rows), function, collect)


def trajectory_folder(config: Config, run: Run) -> str:
    """Return the folder of trajectory scores, below the run.

    Its name depends on the proxy, the scores and their options.
    """
    followed = sorted(config.measure.from_trajectory)
    options = {score: config.measure.trajectory_options(score) for score in followed}
    return f"measured/trajectory-{fingerprint(run.ledger()['proxy'].fingerprint, options)}"


def repeat_folder(folder: str, repeat: int, repeats: int) -> str:
    """Return the folder of the scores from one repeat; the only repeat uses that of all."""
    return storage.join(folder, f"repeat-{repeat}") if repeats > 1 else folder


def _consecutive(units: Sequence[ShardRows], max_rows: int) -> list[list[ShardRows]]:
    """Group consecutive shards, at most `max_rows` rows or one shard in a group."""
    groups: list[list[ShardRows]] = []
    for unit in units:
        follows = bool(groups) and unit.start == groups[-1][-1].stop
        if follows and unit.stop - groups[-1][0].start <= max_rows:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups


def columns_of(scores: list[str]) -> list[str]:
    """Return the columns of the trajectory that scores read.

    At least one of them is a statistic, where a NaN shows that a row is missing.
    """
    from raypipe.scores.registry import score_info
    from raypipe.scores.trajectory import STATISTICS

    columns = {name for score in scores for name in score_info(score).reads}
    if not columns & set(STATISTICS):
        columns.add("margin")
    return [name for name in (*STATISTICS, "probabilities") if name in columns]


def _row_bytes(run: Run, columns: list[str]) -> int:
    """Return the bytes of one sample in the trajectories of all epochs."""
    classes = ProxyManifest.read(run).classes
    row = sum(2 * classes if name == "probabilities" else 4 for name in ("row", *columns))
    return row * max(1, len(trajectory_files(run)))


def score_shards(
    config: Config,
    run_uri: str,
    folder: str,
    scores: list[str],
    units: list[ShardRows],
    repeat: int = 0,
) -> UnitResult:
    """Score the samples of consecutive seed shards in one repeat. Runs in a task."""
    watch, run = Stopwatch(), Run(run_uri)
    tables = [shard_labels(run, unit.shard) for unit in units]
    label = np.concatenate([table["label"].to_numpy().astype(np.int64) for table in tables])
    start, stop = units[0].start, units[-1].stop
    options = {score: config.measure.trajectory_options(score) for score in scores}
    values = score_rows(run, start, stop, label, options, repeat)
    for unit, table in zip(units, tables, strict=True):
        rows = slice(unit.start - start, unit.stop - start)
        for score in scores:
            table = table.append_column(score, pa.array(values[score][rows]))
        storage.write_table(run.path(folder, f"{unit.shard}.parquet"), table)
    return UnitResult(units[0].shard, stop - start, cpu_seconds=watch.lap())


def score_rows(
    run: Run,
    start: int,
    stop: int,
    label: np.ndarray,
    options: dict[str, dict[str, Any]],
    repeat: int = 0,
) -> dict[str, np.ndarray]:
    """Compute trajectory scores of rows `start` to `stop` of the seed set in one pass.

    Parameters
    ----------
    run
        The run.
    start, stop
        The rows; `stop` is exclusive.
    label
        int64 [stop - start].
    options
        Keyword arguments of each score's function, by the name of the score.
    repeat
        The repeat whose proxies were trained.

    Returns
    -------
    dict of str to np.ndarray
        float32 [stop - start] by the name of the score.
    """
    from raypipe.scores.registry import trajectory_score
    from raypipe.scores.trajectory import Trajectory

    functions = {score: trajectory_score(score) for score in options}
    values = {score: np.empty(stop - start, np.float32) for score in options}
    for first, last, arrays in read_trajectory(run, start, stop, columns_of(list(options)), repeat):
        rows = slice(first - start, last - start)
        trajectory = Trajectory.from_recorded(label[rows], arrays)
        for score, function in functions.items():
            values[score][rows] = function(trajectory, **options[score])
    return values


def read_trajectory(
    run: Run, start: int, stop: int, columns: list[str], repeat: int = 0
) -> Iterator[tuple[int, int, Rows]]:
    """Read rows `start` to `stop` of the seed set in one repeat, in blocks of bounded size.

    Yields
    ------
    tuple
        First row, last row (exclusive), and by column float32 [epochs, rows], the probabilities
        [epochs, rows, classes]. NaN where an epoch has no such row.

    Notes
    -----
    The next block overwrites the probabilities of a block.
    """
    epochs, classes = len(trajectory_files(run)), ProxyManifest.read(run).classes
    size = stop - start
    probabilities = np.empty((0, 0, 0), np.float32)
    if "probabilities" in columns:
        size = max(1, BLOCK_BYTES // (4 * classes * max(1, epochs)))
        probabilities = np.empty((epochs, size, classes), np.float32)
    for first, last, stored in read_groups(run, start, stop, columns, repeat):
        for low in range(first, last, size):
            high = min(low + size, last)
            arrays: Rows = {}
            for name in columns:
                if name == "probabilities":
                    arrays[name] = probabilities[:, : high - low]
                else:
                    arrays[name] = np.empty((epochs, high - low), np.float32)
                for epoch, pieces in enumerate(stored):
                    _fill(arrays[name][epoch], low, pieces, name)
            yield low, high, arrays


def _fill(target: np.ndarray, low: int, pieces: list[Rows], name: str) -> None:
    """Write a column of an epoch, rows from `low` on, into `target`; NaN for missing rows."""
    high, filled = low + len(target), 0
    for piece in pieces:
        first, last = np.searchsorted(piece["row"], (low, high))
        if last - first == len(target):
            _copy(piece[name][first:last], target)
            return
        filled += last - first
    if filled < len(target):
        target.fill(np.nan)
    for piece in pieces:
        first, last = np.searchsorted(piece["row"], (low, high))
        values = piece[name][first:last]
        if values.dtype == np.float16:
            converted = np.empty(values.shape, np.float32)
            _copy(values, converted)
            values = converted
        target[piece["row"][first:last] - low] = values


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy an array into one of the same shape, float16 or float32 to float32."""
    if source.dtype == np.float16:  # numpy converts float16 a hundred times slower than torch
        import torch

        torch.from_numpy(target).copy_(torch.from_numpy(source))
    else:
        target[...] = source


def read_groups(
    run: Run, start: int, stop: int, columns: list[str], repeat: int = 0
) -> Iterator[tuple[int, int, list[list[Rows]]]]:
    """Read rows `start` to `stop` of the seed set in one repeat, as they are stored.

    Every row group is read once, and at most about two of a file are held.

    Yields
    ------
    tuple
        First row, last row (exclusive), and for every epoch the rows between them, one piece per
        file and row group.
    """
    epochs = [
        [_TrajectoryFile(run.path(file), columns, start) for file in files]
        for files in trajectory_files(run, repeat)
    ]
    step = max((sum(file.group_rows for file in files) for files in epochs), default=0)
    step = step or stop - start
    first = start
    while first < stop:
        # where one worker wrote all rows, row groups end at multiples of the step
        last = min(stop, (first // step + 1) * step)
        yield (
            first,
            last,
            [[piece for file in files for piece in file.take(first, last)] for files in epochs],
        )
        first = last


class _TrajectoryFile:
    """One trajectory file, read a row group at a time in the order of its rows.

    Attributes
    ----------
    group_rows : int
        Rows of the largest row group.
    """

    def __init__(self, uri: str, columns: list[str], start: int) -> None:
        self._uri, self._columns = uri, ["row", *columns]
        with storage.open_read(uri) as file:
            self._metadata = pq.read_metadata(file)
        groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        self.group_rows = max((group.num_rows for group in groups), default=0)
        bounds = [group.column(0).statistics for group in groups if group.num_rows]
        # row groups still to be read, each with its first row
        self._unread = deque(
            (group, bound.min) for group, bound in enumerate(bounds) if bound.max >= start
        )
        # rows of the last row group read that no call has taken
        self._rest: Rows | None = None

    def take(self, first: int, last: int) -> list[Rows]:
        """Return the rows from `first` to `last` (exclusive); calls must ascend."""
        pieces = []
        while self._rest is not None or (self._unread and self._unread[0][1] < last):
            rows = self._rest if self._rest is not None else self._read(self._unread.popleft()[0])
            low, high = np.searchsorted(rows["row"], (first, last))
            if low < high:
                pieces.append({name: values[low:high] for name, values in rows.items()})
            self._rest = None
            if high < len(rows["row"]):
                self._rest = {name: values[high:] for name, values in rows.items()}
                break
        return pieces

    def _read(self, group: int) -> Rows:
        with storage.open_read(self._uri) as file:
            table = pq.ParquetFile(file, metadata=self._metadata).read_row_group(
                group, self._columns, use_threads=False
            )
        return {
            name: probabilities_of(table) if name == "probabilities" else table[name].to_numpy()
            for name in self._columns
        }


def probabilities_of(table: pa.Table) -> np.ndarray:
    """Return the probabilities of a trajectory file, float16 [rows, classes], without a copy."""
    import torch

    column = table["probabilities"].combine_chunks()
    classes = column.type.byte_width // 2
    # through torch: numpy would mark Arrow's memory as read-only, and torch warns about such arrays
    values = pa.Array.from_buffers(
        pa.float16(),
        len(column) * classes,
        [None, column.buffers()[1]],
        offset=column.offset * classes,
    )
    return torch.from_dlpack(values).numpy().reshape(len(column), classes)
