"""Measure: the measured scores of every seed sample.

Writes `measured/<shard>.parquet` (sample_id, label, a float32 column per score of `measure.scores`), from what
`raypipe.stages.gradients` and `raypipe.stages.trajectories` left beside it; and `measured/audit/<shard>.parquet` with the gradient
scores of the audit set: alignments with the mean gradients of the seed set. A trajectory score needs training on the sample.
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
from raypipe.stages.gradients import GRADIENT_SCORES, Folders, measure_gradients, uses_self_term
from raypipe.stages.proxy import proxy_manifest
from raypipe.stages.seed import seed_manifest
from raypipe.stages.trajectories import measure_trajectories, trajectory_folder

AUDIT_FOLDER = "measured/audit"


class MeasureStage(Stage):
    name = "measure"
    needs = ("proxy",)

    def settings(self, config: Config) -> dict[str, Any]:
        return {score: config.measure.options(score) for score in sorted(config.measure.scores)}

    def clear(self, context: Context) -> None:
        """Only the scores go. What they are combined from has the settings in its name, and may still serve."""
        for shard in context.run.done("measured"):
            storage.delete(context.run.path("measured", f"{shard}.parquet"))
        storage.delete(context.run.path(AUDIT_FOLDER))

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            seed = seed_manifest(context.run)
        except FileNotFoundError:
            return False
        audit = seed["audit_shards"] if set(GRADIENT_SCORES) & set(context.config.measure.scores) else []
        return set(seed["shards"]) <= context.run.done("measured") and set(audit) <= context.run.done(AUDIT_FOLDER)

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        from_gradients: list[str] = [score for score in config.measure.scores if score in GRADIENT_SCORES]
        from_trajectory: list[str] = [score for score in config.measure.scores if score not in GRADIENT_SCORES]
        if from_gradients:
            measure_gradients(context, record)
        if from_trajectory:
            measure_trajectories(context, record, from_trajectory)
        seed = seed_manifest(run)
        detail: dict[str, Any] = {"scores": list(config.measure.scores)}
        folders, trajectories = Folders.of(config, run), trajectory_folder(config, run)
        moso = _MosoTotals(config, run, folders.checkpoints, seed["shards"]) if "moso" in from_gradients else None
        if moso is not None:
            detail["moso"] = moso.detail
        count = 0
        for shard in seed["shards"]:
            found = _numbers_of(run, folders.checkpoints, shard) if from_gradients else None
            followed = _numbers_of(run, trajectories, shard) if from_trajectory else None
            count += _combine(config, run, shard, moso, found, followed)
        audited = 0
        for shard in seed["audit_shards"] if from_gradients else []:
            audited += _combine(config, run, shard, moso, _numbers_of(run, folders.checkpoints, shard), None, audit=True)
        if count != seed["samples"]:
            raise StageError(f"{count} of {seed['samples']} seed samples were measured; run again to measure the rest")
        current = {storage.name(folder) for folder in (*vars(folders).values(), trajectories, AUDIT_FOLDER)}
        for stale in storage.names(run.path("measured")) - current:
            if not stale.endswith(".parquet"):
                storage.delete(run.path("measured", stale))
        record.samples, record.detail = count + audited, {**detail, "audit_samples": audited}


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

    def score(self, table: pa.Table, audit: bool) -> np.ndarray:
        """MoSo, float32 [n], of a shard of the seed set, or of the audit set."""
        from raypipe.scores.moso import combine, joining, without_itself

        aligned = _numbers(table, "alignments")
        if self.self_term:
            squares, count, mean_square = _numbers(table, "squares"), self.samples, self.mean_square
            if audit:
                aligned, mean_square = joining(aligned, squares, count, mean_square)
                count += 1
            aligned = without_itself(aligned, squares, count, self.settings.formula, mean_square)
        return combine(aligned, self.rates, self.settings.weights, steps=self.steps, samples=self.samples, spread=self.spread)


def _combine(
    config: Config, run: Run, shard: str, moso: _MosoTotals | None, found: Any, followed: Any, audit: bool = False
) -> int:
    """Write the scores of one shard from what its gradients (`found`) and its trajectory (`followed`) gave; returns its samples."""
    columns: dict[str, Any] = {}
    if found is not None:
        if moso is not None:
            columns["moso"] = moso.score(found, audit)
        if "grand" in config.measure.scores:
            columns["grand"] = _numbers(found, "lengths").mean(1).astype(np.float32)
    if followed is not None:
        columns |= {score: followed[score].to_numpy() for score in followed.column_names[2:]}
    table = (found if found is not None else followed).select(["sample_id", "label"])
    for score in (score for score in config.measure.scores if score in columns):
        bad = int((~np.isfinite(columns[score])).sum())
        if bad:
            raise StageError(f"{score} of {bad} samples of {shard} is not finite: the proxy's training diverged; lower proxy.lr")
        table = table.append_column(score, pa.array(columns[score], pa.float32()))
    storage.write_table(run.path(AUDIT_FOLDER if audit else "measured", f"{shard}.parquet"), table)
    return len(table)


def _numbers_of(run: Run, folder: str, shard: str) -> pa.Table:
    return storage.read_table(run.path(folder, f"{shard}.parquet"))


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column of lists as float64 [samples, checkpoints]."""
    if not len(table):
        return np.zeros((0, table.schema.field(column).type.list_size))
    return np.asarray(table[column].combine_chunks().flatten(), np.float64).reshape(len(table), -1)
