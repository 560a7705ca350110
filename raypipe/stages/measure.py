"""Measure: the measured scores of every seed sample.

Writes `measured/<shard>.parquet` (sample_id, label, a float32 column per score of `measure.scores`), from what
`raypipe.stages.gradients` and `raypipe.stages.trajectories` left beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.rundir import Run, StageRecord
from raypipe.stages.base import Context, Stage
from raypipe.stages.gradients import GRADIENT_SCORES, SELF_TERM_BELOW, Folders, measure_gradients, uses_self_term
from raypipe.stages.proxy import empty_proxy, proxy_manifest
from raypipe.stages.seed import seed_manifest
from raypipe.stages.trajectories import measure_trajectories, trajectory_folder


class MeasureStage(Stage):
    name = "measure"
    needs = ("proxy",)

    def settings(self, config: Config) -> dict[str, Any]:
        options = {score: config.measure.options(score) for score in sorted(config.measure.scores)}
        return options | {"precision": config.measure.precision}

    def clear(self, context: Context) -> None:
        """Only the scores go. What they are combined from has the settings in its name, and may still serve."""
        for shard in context.run.done("measured"):
            storage.delete(context.run.path("measured", f"{shard}.parquet"))

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            shards = seed_manifest(context.run)["shards"]
        except FileNotFoundError:
            return False
        return set(shards) <= context.run.done("measured")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        from_gradients: list[str] = [score for score in config.measure.scores if score in GRADIENT_SCORES]
        from_trajectory: list[str] = [score for score in config.measure.scores if score not in GRADIENT_SCORES]
        detail: dict[str, Any] = {"scores": list(config.measure.scores)}
        if from_gradients:
            detail |= _announce(context)
            measure_gradients(context, record)
        if from_trajectory:
            measure_trajectories(context, record, from_trajectory)
        seed = seed_manifest(run)
        folders, trajectories = Folders.of(config, run), trajectory_folder(config, run)
        moso = _MosoTotals(config, run, folders.checkpoints, seed["shards"]) if "moso" in from_gradients else None
        if moso is not None:
            detail["moso"] = moso.detail
        count = 0
        for shard in seed["shards"]:
            found = _numbers_of(run, folders.checkpoints, shard) if from_gradients else None
            followed = _numbers_of(run, trajectories, shard) if from_trajectory else None
            count += _combine(config, run, shard, moso, found, followed)
        if count != seed["samples"]:
            raise StageError(f"{count} of {seed['samples']} seed samples were measured; run again to measure the rest")
        current = {storage.name(folder) for folder in (*vars(folders).values(), trajectories)}
        for stale in storage.names(run.path("measured")) - current:
            if not stale.endswith(".parquet"):
                storage.delete(run.path("measured", stale))
        record.samples, record.detail = count, detail


def _announce(context: Context) -> dict[str, Any]:
    """Say what `self_term: auto` decided, and which layers have no fast rule for per-sample gradients; both for the ledger."""
    config, samples = context.config, seed_manifest(context.run)["samples"]
    moso, grand = config.measure.moso, config.measure.grand
    self_term = "moso" in config.measure.scores and uses_self_term(moso, samples)
    if "moso" in config.measure.scores and moso.self_term == "auto":
        side = f"below {SELF_TERM_BELOW:,}: with" if self_term else f"{SELF_TERM_BELOW:,} or more: without"
        context.progress.say(f"{'measure':<11} self term: {samples:,} seed samples are {side} it")
    slow: list[str] = []
    if (self_term and moso.gradient == "all") or ("grand" in config.measure.scores and grand.gradient == "all"):
        from raypipe.scores.per_sample import slow_parameters

        slow = slow_parameters(empty_proxy(context.run))
    if slow:
        context.progress.say(
            f"{'measure':<11} {len(slow)} weights have no fast per-sample rule and take a slower, exact way: {slow[0]}, ..."
        )
    return {"slow_parameters": slow} if slow else {}


class _MosoTotals:
    """What MoSo needs of the whole seed set: its size and, per checkpoint, the spread of the alignments."""

    def __init__(self, config: Config, run: Run, folder: str, shards: list[str]) -> None:
        manifest = proxy_manifest(run)
        self.settings, self.steps = config.measure.moso, manifest["steps"]
        self.rates = np.array([item["lr"] for item in manifest["checkpoints"]])
        self.samples, total, square = 0, np.zeros(len(self.rates)), np.zeros(len(self.rates))
        for shard in shards:
            aligned = _numbers(_numbers_of(run, folder, shard), "alignments")
            self.samples += len(aligned)
            total += aligned.sum(0)
            square += np.square(aligned).sum(0)
        mean = total / self.samples
        self.self_term = uses_self_term(self.settings, self.samples)
        self.spread = np.sqrt(np.maximum(square / self.samples - mean**2, 0))
        # < G, g > averaged over the seed set is |G|^2
        self.mean_square = mean
        self.detail = {"self_term": self.self_term, "mean": mean.tolist(), "spread": self.spread.tolist()}

    def score(self, table: pa.Table) -> np.ndarray:
        from raypipe.scores.moso import combine, without_itself

        aligned = _numbers(table, "alignments")
        if self.self_term:
            squares = _numbers(table, "squares")
            aligned = without_itself(aligned, squares, self.samples, self.settings.formula, self.mean_square)
        return combine(aligned, self.rates, self.settings.weights, steps=self.steps, samples=self.samples, spread=self.spread)


def _combine(config: Config, run: Run, shard: str, moso: _MosoTotals | None, found: Any, followed: Any) -> int:
    """Write the scores of one shard from what its gradients (`found`) and its trajectory (`followed`) gave; returns its samples."""
    columns: dict[str, Any] = {}
    if found is not None:
        if moso is not None:
            columns["moso"] = moso.score(found)
        if "grand" in config.measure.scores:
            columns["grand"] = _numbers(found, "lengths").mean(1).astype(np.float32)
    if followed is not None:
        columns |= {score: followed[score].to_numpy() for score in followed.column_names[2:]}
    table = (found if found is not None else followed).select(["sample_id", "label"])
    for score in config.measure.scores:
        bad = int((~np.isfinite(columns[score])).sum())
        if bad:
            raise StageError(f"{score} of {bad} samples of {shard} is not finite: the proxy's training diverged; lower proxy.lr")
        table = table.append_column(score, pa.array(columns[score], pa.float32()))
    storage.write_table(run.path("measured", f"{shard}.parquet"), table)
    return len(table)


def _numbers_of(run: Run, folder: str, shard: str) -> pa.Table:
    return storage.read_table(run.path(folder, f"{shard}.parquet"))


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column of lists as float64 [samples, checkpoints]."""
    if not len(table):
        return np.zeros((0, table.schema.field(column).type.list_size))
    return np.asarray(table[column].combine_chunks().flatten(), np.float64).reshape(len(table), -1)
