"""Measure: the measured scores of every seed sample.

Writes `measured/<shard>.parquet` (sample_id, label, a float32 column per score of `measure.scores`), from what
`raypipe.stages.gradients` and `raypipe.stages.trajectories` left beside it; and `measured/audit/<shard>.parquet` with the scores at
checkpoints of the audit set: its alignments with the mean gradients of the seed set. A trajectory score needs training on the sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import SELF_TERM_BELOW, Config, MeanSettings
from raypipe.errors import StageError
from raypipe.rundir import Run, StageRecord
from raypipe.stages.base import Context, Stage
from raypipe.stages.gradients import OUTPUTS, Folders, measure_gradients, measure_shards, smallest
from raypipe.stages.parts import Part, joined
from raypipe.stages.proxy import empty_proxy, proxy_parts
from raypipe.stages.seed import seed_manifest
from raypipe.stages.trajectories import measure_trajectories, trajectory_folder

AUDIT_FOLDER = "measured/audit"


class MeasureStage(Stage):
    name = "measure"
    needs = ("proxy",)

    def settings(self, config: Config) -> dict[str, Any]:
        options = {score: config.measure.options(score) for score in sorted(config.measure.scores)}
        return options | {"precision": config.measure.precision, "recalibrate": config.measure.recalibrate}

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
        audit = seed["audit_shards"] if context.config.measure.at_checkpoints else []
        return set(seed["shards"]) <= context.run.done("measured") and set(audit) <= context.run.done(AUDIT_FOLDER)

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        at_checkpoints = config.measure.at_checkpoints
        from_trajectory: list[str] = [score for score in config.measure.scores if score not in at_checkpoints]
        detail: dict[str, Any] = {"scores": list(config.measure.scores)}
        if at_checkpoints:
            detail |= _announce(context)
            measure_gradients(context, record)
        if from_trajectory:
            measure_trajectories(context, record, from_trajectory)
        seed = seed_manifest(run)
        folders, trajectories = Folders.of(config, run), trajectory_folder(config, run)
        parts = proxy_parts(run)
        moso = _MosoTotals.of_parts(config, run, parts, folders.checkpoints, seed["shards"]) if "moso" in at_checkpoints else None
        if moso is not None:
            detail["moso"] = moso[0].detail if len(moso) == 1 else {"parts": [totals.detail for totals in moso]}
        count = 0
        for shard in seed["shards"]:
            found = [_of_checkpoints(config, run, parts, folders.checkpoints, shard, moso)] if at_checkpoints else []
            followed = [_numbers_of(run, trajectories, shard)] if from_trajectory else []
            count += _combine(config, run, "measured", shard, found + followed)
        audited = 0
        for shard in seed["audit_shards"] if at_checkpoints else []:
            found = [_of_checkpoints(config, run, parts, folders.checkpoints, shard, moso, audit=True)]
            audited += _combine(config, run, AUDIT_FOLDER, shard, found)
        if count != seed["samples"]:
            raise StageError(f"{count} of {seed['samples']} seed samples were measured; run again to measure the rest")
        current = {storage.name(folder) for folder in (*vars(folders).values(), trajectories, AUDIT_FOLDER)}
        for stale in storage.names(run.path("measured")) - current:
            if not stale.endswith(".parquet"):
                storage.delete(run.path("measured", stale))
        record.samples, record.detail = count + audited, {**detail, "audit_samples": audited}


def measure_more(context: Context, record: StageRecord, shard: str) -> pa.Table:
    """sample_id, label and the scores at checkpoints of one more shard in `seed/`, of samples outside the seed set.

    The stage must be done: its checkpoints and mean gradients are used, and nothing is left in `measured/`.
    """
    config, run = context.config, context.run
    parts, folder = proxy_parts(run), Folders.of(config, run).checkpoints
    for part in parts:
        measure_shards(context, record, part, smallest(parts), [shard], lambda samples: None)
    moso = None
    if "moso" in config.measure.at_checkpoints:
        moso = _MosoTotals.of_parts(config, run, parts, folder, seed_manifest(run)["shards"])
    table = _of_checkpoints(config, run, parts, folder, shard, moso, audit=True)
    for part in parts:
        storage.delete(run.path(part.below(folder), f"{shard}.parquet"))
    return table


def _announce(context: Context) -> dict[str, Any]:
    """Say what `self_term: auto` decided, and which layers have no fast rule for per-sample gradients; both for the ledger."""
    config, samples = context.config, smallest(proxy_parts(context.run))
    moso, grand = config.measure.moso, config.measure.grand
    self_term = "moso" in config.measure.scores and moso.uses_self_term(samples)
    if "moso" in config.measure.scores and moso.self_term == "auto":
        side = f"below {SELF_TERM_BELOW:,}: with" if self_term else f"{SELF_TERM_BELOW:,} or more: without"
        context.progress.say(f"{'measure':<11} self term: {samples:,} samples are {side} it")
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
    """What MoSo needs of a whole part of the seed set: its size and, per checkpoint, the spread of the alignments.

    With several parts T, N and the spread are those of the part, so that scores are computed within it (Algorithm 1 of the paper).
    """

    @classmethod
    def of_parts(cls, config: Config, run: Run, parts: list[Part], folder: str, shards: list[str]) -> list[_MosoTotals]:
        self_term = config.measure.moso.uses_self_term(smallest(parts))
        return [cls(config, run, part, part.below(folder), shards, self_term) for part in parts]

    def __init__(self, config: Config, run: Run, part: Part, folder: str, shards: list[str], self_term: bool) -> None:
        self.settings, self.steps, self.self_term = config.measure.moso, part.trained["steps"], self_term
        self.rates = np.array([item["lr"] for item in part.trained["checkpoints"]])
        self.samples, total, square = 0, np.zeros(len(self.rates)), np.zeros(len(self.rates))
        for shard in shards:
            aligned = _numbers(_numbers_of(run, folder, shard), "alignments")
            self.samples += len(aligned)
            total += aligned.sum(0)
            square += np.square(aligned).sum(0)
        mean = total / self.samples
        self.spread = np.sqrt(np.maximum(square / self.samples - mean**2, 0))
        # < G, g > averaged over the part is |G|^2
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


def _of_checkpoints(
    config: Config, run: Run, parts: list[Part], folder: str, shard: str, moso: list[_MosoTotals] | None, audit: bool = False
) -> pa.Table:
    """sample_id, label and the scores at checkpoints of one shard, each sample's from the proxy of its own part."""
    tables = []
    for number, part in enumerate(parts):
        found = _numbers_of(run, part.below(folder), shard)
        table = found.select(["sample_id", "label"])
        if moso is not None:
            table = table.append_column("moso", pa.array(moso[number].score(found, audit), pa.float32()))
        if "grand" in config.measure.scores:
            table = table.append_column("grand", pa.array(_numbers(found, "lengths").mean(1).astype(np.float32)))
        for score in (score for score in config.measure.at_checkpoints if score in OUTPUTS):
            table = table.append_column(
                score, pa.array(_mean(config, part, _numbers(found, OUTPUTS[score]), score), pa.float32())
            )
        tables.append(table)
    return joined(run, parts, shard, tables)


def _mean(config: Config, part: Part, numbers: np.ndarray, score: str) -> np.ndarray:
    """Mean over the checkpoints among the epochs that are asked for; numbers float64 [n, checkpoints], returns float32 [n]."""
    settings = config.measure.settings_of(score)
    assert isinstance(settings, MeanSettings)
    chosen = [column for column, item in enumerate(part.trained["checkpoints"]) if settings.takes(item["epoch"])]
    return numbers[:, chosen].mean(1).astype(np.float32)


def _combine(config: Config, run: Run, folder: str, shard: str, given: list[pa.Table]) -> int:
    """Write the scores of one shard, which tables of the same samples have among them; returns its samples."""
    columns = {score: table[score].to_numpy() for table in given for score in table.column_names[2:]}
    table = given[0].select(["sample_id", "label"])
    for score in (score for score in config.measure.scores if score in columns):
        bad = int((~np.isfinite(columns[score])).sum())
        if bad:
            raise StageError(f"{score} of {bad} samples of {shard} is not finite: the proxy's training diverged; lower proxy.lr")
        table = table.append_column(score, pa.array(columns[score], pa.float32()))
    storage.write_table(run.path(folder, f"{shard}.parquet"), table)
    return len(table)


def _numbers_of(run: Run, folder: str, shard: str) -> pa.Table:
    return storage.read_table(run.path(folder, f"{shard}.parquet"))


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column of lists as float64 [samples, checkpoints]."""
    if not len(table):
        return np.zeros((0, table.schema.field(column).type.list_size))
    return np.asarray(table[column].combine_chunks().flatten(), np.float64).reshape(len(table), -1)
