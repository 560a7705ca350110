"""Trajectory scores of the seed set: tasks that each follow some samples through all epochs.

With several proxies (`proxy.parts`) a sample's trajectory is that of the one trained on its part.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config
from raypipe.rundir import Run, StageRecord, fingerprint
from raypipe.stages.base import Context
from raypipe.stages.gradients import GRADIENT_SCORES
from raypipe.stages.proxy import proxy_manifest, trajectory_files
from raypipe.stages.seed import seed_manifest
from raypipe.stages.streaming import Stopwatch, run_tasks

CHUNK_BYTES = 256 << 20
"""Memory that the probabilities of one chunk of samples take at all epochs, float32."""


def measure_trajectories(context: Context, record: StageRecord, scores: list[str]) -> None:
    """Write `<folder>/<shard>.parquet` (sample_id, label, a column per score) for every seed shard without one."""
    run, seed = context.run, seed_manifest(context.run)
    folder = trajectory_folder(context.config, run)
    done = run.done(folder)
    starts = np.cumsum([0, *seed["shard_samples"]])
    units = [(shard, int(start), int(stop)) for shard, start, stop in zip(seed["shards"], starts[:-1], starts[1:], strict=True)]
    with context.progress.meter("trajectory", seed["samples"]) as meter:
        meter.already(sum(stop - start for shard, start, stop in units if shard in done))

        def collect(result: dict[str, Any]) -> None:
            meter.add(result["samples"])
            record.cpu_seconds += result["cpu_seconds"]

        context.cluster  # Ray is started before tasks are made
        missing = [unit for unit in units if unit[0] not in done]
        run_tasks(missing, functools.partial(_score_shard, context.config, run.uri, folder, scores), collect)


def trajectory_folder(config: Config, run: Run) -> str:
    """Where the scores of a trajectory are, below the run: another proxy, score or option has another folder."""
    options = {score: config.measure.options(score) for score in sorted(config.measure.scores) if score not in GRADIENT_SCORES}
    return f"measured/trajectory-{fingerprint(run.ledger()['proxy'].fingerprint, options)}"


def _score_shard(config: Config, run_uri: str, folder: str, scores: list[str], unit: tuple[str, int, int]) -> dict[str, Any]:
    """Score the samples of one seed shard: rows start to stop of the seed set. Runs in a task."""
    from raypipe.scores.base import trajectory, trajectory_score

    shard, start, stop = unit
    watch, run = Stopwatch(), Run(run_uri)
    table = storage.read_table(run.path("seed", f"{shard}.parquet"), ["sample_id", "label"])
    label = table["label"].to_numpy().astype(np.int64)
    columns: dict[str, list[np.ndarray]] = {score: [] for score in scores}
    for first, last, probabilities, margin in read_trajectory(run, start, stop):
        part = trajectory(probabilities, label[first - start : last - start], margin)
        for score in scores:
            columns[score].append(trajectory_score(score)(part, **config.measure.options(score)))
    for score, parts in columns.items():
        table = table.append_column(score, pa.array(np.concatenate(parts) if parts else np.zeros(0, np.float32)))
    storage.write_table(run.path(folder, f"{shard}.parquet"), table)
    return {"samples": stop - start, "cpu_seconds": watch.lap()}


def read_trajectory(run: Run, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Rows start to stop of the seed set in bounded chunks: first row, last row (exclusive), probabilities float32
    [epochs, rows, classes] and margin float32 [epochs, rows]; not a number where a row is missing in an epoch."""
    epochs, classes = trajectory_files(run), proxy_manifest(run)["classes"]
    size = max(1, CHUNK_BYTES // (4 * classes * max(1, len(epochs))))
    for first in range(start, stop, size):
        last = min(first + size, stop)
        probabilities = np.full((len(epochs), last - first, classes), np.nan, np.float32)
        margin = np.full((len(epochs), last - first), np.nan, np.float32)
        for epoch, files in enumerate(epochs):
            for file in files:
                rows, values, margins = _rows(run.path(file), first, last)
                probabilities[epoch, rows - first] = values.reshape(len(rows), classes)
                margin[epoch, rows - first] = margins
        yield first, last, probabilities, margin


def _rows(uri: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, probabilities and margins of a trajectory file between two rows, reading only the row groups they are in."""
    with storage.open_read(uri) as file:
        parquet = pq.ParquetFile(file)
        groups = []
        for group in range(parquet.num_row_groups):
            bounds = parquet.metadata.row_group(group).column(0).statistics
            if bounds is None or (bounds.max >= first and bounds.min < last):
                groups.append(group)
        table = parquet.read_row_groups(groups)
    rows = table["row"].to_numpy()
    inside = np.flatnonzero((rows >= first) & (rows < last))
    values = np.asarray(table["probabilities"].combine_chunks().flatten()) if len(table) else np.zeros(0, np.float16)
    values = values.reshape(len(table), -1)[inside] if len(table) else values
    return rows[inside], values.reshape(-1), table["margin"].to_numpy()[inside]
