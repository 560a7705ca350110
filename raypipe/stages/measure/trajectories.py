"""Trajectory scores of the seed set: tasks that each follow some samples through all epochs.

With several proxies (`proxy.parts`) a sample's trajectory is that of the one trained on its part.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord, fingerprint
from raypipe.runs.manifests import proxy_manifest, seed_manifest
from raypipe.runs.partition import trajectory_files
from raypipe.runs.seed_shards import shard_labels

BLOCK_BYTES = 16 << 20
"""Memory of the probabilities of the samples that are scored at once, at all epochs, float32: little enough for the cache."""

TASK_BYTES = 512 << 20
"""What one task reads of the trajectory, about: shards that follow one another, so that few row groups are read twice."""

Rows = dict[str, np.ndarray]
"""Some rows of a trajectory file, by column; `row` ascends."""

Unit = tuple[str, int, int]
"""A seed shard: name, first row, last row (exclusive)."""


def measure_trajectories(context: Context, record: StageRecord, scores: list[str]) -> None:
    """Write `<folder>/<shard>.parquet` (sample_id, label, a column per score) for every seed shard without one."""
    run, seed = context.run, seed_manifest(context.run)
    folder = trajectory_folder(context.config, run)
    done = run.done(folder)
    starts = np.cumsum([0, *seed["shard_samples"]])
    units = [
        (shard, int(start), int(stop))
        for shard, start, stop in zip(seed["shards"], starts[:-1], starts[1:], strict=True)
    ]
    with context.progress.meter("trajectory", seed["samples"]) as meter:
        meter.already(sum(stop - start for shard, start, stop in units if shard in done))

        def collect(result: dict[str, Any]) -> None:
            meter.add(result["samples"])
            record.cpu_seconds += result["cpu_seconds"]

        missing = [unit for unit in units if unit[0] not in done]
        tasks = _together(missing, TASK_BYTES // _row_bytes(run, columns_of(scores)))
        context.run_tasks(
            tasks, functools.partial(score_shards, context.config, run.uri, folder, scores), collect
        )


def trajectory_folder(config: Config, run: Run) -> str:
    """Where the scores of a trajectory are, below the run: another proxy, score or option has another folder."""
    followed = sorted(set(config.measure.scores) - set(config.measure.at_checkpoints))
    options = {score: config.measure.trajectory_options(score) for score in followed}
    return f"measured/trajectory-{fingerprint(run.ledger()['proxy'].fingerprint, options)}"


def _together(units: list[Unit], rows: int) -> list[list[Unit]]:
    """Shards that follow one another, in groups of at most so many rows, or of one shard."""
    groups: list[list[Unit]] = []
    for unit in units:
        if groups and unit[1] == groups[-1][-1][2] and unit[2] - groups[-1][0][1] <= rows:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups


def columns_of(scores: list[str]) -> list[str]:
    """Columns of the trajectory that scores read, at least one of the numbers: these tell where a row is missing."""
    from raypipe.scores.registry import SCORES
    from raypipe.scores.trajectory import STATISTICS

    wanted = {name for score in scores for name in SCORES[score].reads}
    if not wanted & set(STATISTICS):
        wanted.add("margin")
    return [name for name in (*STATISTICS, "probabilities") if name in wanted]


def _row_bytes(run: Run, columns: list[str]) -> int:
    classes = proxy_manifest(run)["classes"]
    row = sum(2 * classes if name == "probabilities" else 4 for name in ("row", *columns))
    return row * max(1, len(trajectory_files(run)))


def score_shards(
    config: Config, run_uri: str, folder: str, scores: list[str], units: list[Unit]
) -> dict[str, Any]:
    """Score the samples of seed shards that follow one another. Runs in a task."""
    watch, run = Stopwatch(), Run(run_uri)
    tables = [shard_labels(run, shard) for shard, _, _ in units]
    label = np.concatenate([table["label"].to_numpy().astype(np.int64) for table in tables])
    start, stop = units[0][1], units[-1][2]
    found = score_rows(
        run,
        start,
        stop,
        label,
        {score: config.measure.trajectory_options(score) for score in scores},
    )
    for (shard, first, last), table in zip(units, tables, strict=True):
        for score, values in found.items():
            table = table.append_column(score, pa.array(values[first - start : last - start]))
        storage.write_table(run.path(folder, f"{shard}.parquet"), table)
    return {"samples": stop - start, "cpu_seconds": watch.lap()}


def score_rows(
    run: Run, start: int, stop: int, label: np.ndarray, options: dict[str, dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Trajectory scores of rows start to stop of the seed set, float32 [rows] each, from one reading.

    label    int64 [rows]
    options  of each score, by its name
    """
    from raypipe.scores.registry import trajectory_score
    from raypipe.scores.trajectory import recorded

    functions = {score: trajectory_score(score) for score in options}
    found = {score: np.empty(stop - start, np.float32) for score in options}
    for first, last, arrays in read_trajectory(run, start, stop, columns_of(list(options))):
        rows = slice(first - start, last - start)
        followed = recorded(label[rows], arrays)
        for score, function in functions.items():
            found[score][rows] = function(followed, **options[score])
    return found


def read_trajectory(
    run: Run, start: int, stop: int, columns: list[str]
) -> Iterator[tuple[int, int, Rows]]:
    """Rows start to stop of the seed set in blocks of bounded size: first row, last row (exclusive), and by column float32
    [epochs, rows], the probabilities [epochs, rows, classes]; not a number where a row is missing in an epoch.

    The probabilities of a block are overwritten by the next.
    """
    epochs, classes = len(trajectory_files(run)), proxy_manifest(run)["classes"]
    size = (
        max(1, BLOCK_BYTES // (4 * classes * max(1, epochs)))
        if "probabilities" in columns
        else stop - start
    )
    space = np.empty((epochs, size, classes), np.float32) if "probabilities" in columns else None
    for first, last, found in read_groups(run, start, stop, columns):
        for low in range(first, last, size):
            high = min(low + size, last)
            arrays: Rows = {}
            for name in columns:
                if name == "probabilities":
                    assert space is not None
                    arrays[name] = space[:, : high - low]
                else:
                    arrays[name] = np.empty((epochs, high - low), np.float32)
                for epoch, parts in enumerate(found):
                    _fill(arrays[name][epoch], low, parts, name)
            yield low, high, arrays


def _fill(target: np.ndarray, low: int, parts: list[Rows], name: str) -> None:
    """Write the rows from `low` on that are in the parts of an epoch, and not a number for those that are in none."""
    high, filled = low + len(target), 0
    for part in parts:
        first, last = np.searchsorted(part["row"], (low, high))
        if last - first == len(target):
            _copy(part[name][first:last], target)
            return
        filled += last - first
    if filled < len(target):
        target.fill(np.nan)
    for part in parts:
        first, last = np.searchsorted(part["row"], (low, high))
        values = part[name][first:last]
        if values.dtype == np.float16:
            copied = np.empty(values.shape, np.float32)
            _copy(values, copied)
            values = copied
        target[part["row"][first:last] - low] = values


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    if source.dtype == np.float16:  # numpy converts these a hundred times slower
        import torch

        torch.from_numpy(target).copy_(torch.from_numpy(source))
    else:
        target[...] = source


def read_groups(
    run: Run, start: int, stop: int, columns: list[str]
) -> Iterator[tuple[int, int, list[list[Rows]]]]:
    """Rows start to stop of the seed set as they are stored: first row, last row (exclusive), and for every epoch the parts
    of its files that are between them. Every row group is read once, and at most about two of a file are held."""
    epochs = [
        [_Following(run.path(file), columns, start) for file in files]
        for files in trajectory_files(run)
    ]
    step = (
        max((sum(file.group_rows for file in files) for files in epochs), default=0) or stop - start
    )
    first = start
    while first < stop:
        last = min(
            stop, (first // step + 1) * step
        )  # where one worker wrote all rows, row groups end there
        yield (
            first,
            last,
            [[part for file in files for part in file.take(first, last)] for files in epochs],
        )
        first = last


class _Following:
    """One trajectory file, read a row group at a time in the order of its rows."""

    def __init__(self, uri: str, columns: list[str], start: int) -> None:
        self._uri, self._columns = uri, ["row", *columns]
        with storage.open_read(uri) as file:
            self._metadata = pq.read_metadata(file)
        groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        self.group_rows = max((group.num_rows for group in groups), default=0)
        bounds = [group.column(0).statistics for group in groups if group.num_rows]
        self._waiting = deque(
            (group, bound.min) for group, bound in enumerate(bounds) if bound.max >= start
        )
        self._rest: Rows | None = None

    def take(self, first: int, last: int) -> list[Rows]:
        """The rows from first to last (exclusive), not before those of the call before."""
        parts = []
        while self._rest is not None or (self._waiting and self._waiting[0][1] < last):
            part = self._rest if self._rest is not None else self._read(self._waiting.popleft()[0])
            low, high = np.searchsorted(part["row"], (first, last))
            if low < high:
                parts.append({name: values[low:high] for name, values in part.items()})
            self._rest = (
                {name: values[high:] for name, values in part.items()}
                if high < len(part["row"])
                else None
            )
            if self._rest is not None:
                break
        return parts

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
    """The probabilities of a trajectory file, float16 [rows, classes], in the table's memory."""
    import torch

    column = table["probabilities"].combine_chunks()
    classes = column.type.byte_width // 2
    # by way of torch: numpy marks Arrow's memory as read-only, and torch warns of such arrays wherever they are used
    values = pa.Array.from_buffers(
        pa.float16(),
        len(column) * classes,
        [None, column.buffers()[1]],
        offset=column.offset * classes,
    )
    return torch.from_dlpack(values).numpy().reshape(len(column), classes)
