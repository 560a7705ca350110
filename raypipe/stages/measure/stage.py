"""Measure: the measured scores of every seed sample.

Writes `measured/<shard>.parquet` (sample_id, label, a float32 column per score of `measure.scores`), from what
`raypipe.stages.measure.gradients` and `raypipe.stages.measure.trajectories` left beside it; and `measured/audit/<shard>.parquet` with the scores at
checkpoints of the audit set: its alignments with the mean gradients of the seed set. A trajectory score needs training on the sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import SELF_TERM_BELOW, Config, MeanSettings
from raypipe.distributed.context import Context
from raypipe.errors import StageError
from raypipe.runs.checkpoints import empty_proxy
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import seed_manifest
from raypipe.runs.partition import SeedPart, merge_parts, proxy_parts
from raypipe.stages.base import Stage
from raypipe.stages.measure.gradients import (
    OUTPUTS,
    GradientFolders,
    measure_gradients,
    measure_shards,
    smallest_part,
)
from raypipe.stages.measure.moso import MosoTotals, numbers_in, read_numbers
from raypipe.stages.measure.trajectories import measure_trajectories, trajectory_folder

AUDIT_FOLDER = "measured/audit"


class MeasureStage(Stage):
    name = "measure"
    needs = ("proxy",)

    def settings(self, config: Config) -> dict[str, Any]:
        options = {score: config.measure.options(score) for score in sorted(config.measure.scores)}
        return options | {
            "precision": config.measure.precision,
            "recalibrate": config.measure.recalibrate,
        }

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
        return set(seed["shards"]) <= context.run.done("measured") and set(
            audit
        ) <= context.run.done(AUDIT_FOLDER)

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        at_checkpoints = config.measure.at_checkpoints
        from_trajectory: list[str] = [
            score for score in config.measure.scores if score not in at_checkpoints
        ]
        detail: dict[str, Any] = {"scores": list(config.measure.scores)}
        if at_checkpoints:
            detail |= _announce(context)
            measure_gradients(context, record)
        if from_trajectory:
            measure_trajectories(context, record, from_trajectory)
        seed = seed_manifest(run)
        folders, trajectories = GradientFolders.of(config, run), trajectory_folder(config, run)
        parts = proxy_parts(run)
        moso = (
            MosoTotals.of_parts(config, run, parts, folders.checkpoints, seed["shards"])
            if "moso" in at_checkpoints
            else None
        )
        if moso is not None:
            detail["moso"] = (
                moso[0].detail if len(moso) == 1 else {"parts": [totals.detail for totals in moso]}
            )
        count = 0
        for shard in seed["shards"]:
            found = (
                [_of_checkpoints(config, run, parts, folders.checkpoints, shard, moso)]
                if at_checkpoints
                else []
            )
            followed = [read_numbers(run, trajectories, shard)] if from_trajectory else []
            count += _combine(config, run, "measured", shard, found + followed)
        audited = 0
        for shard in seed["audit_shards"] if at_checkpoints else []:
            found = [
                _of_checkpoints(config, run, parts, folders.checkpoints, shard, moso, audit=True)
            ]
            audited += _combine(config, run, AUDIT_FOLDER, shard, found)
        if count != seed["samples"]:
            raise StageError(
                f"{count} of {seed['samples']} seed samples were measured; run again to measure the rest"
            )
        current = {
            storage.name(folder) for folder in (*vars(folders).values(), trajectories, AUDIT_FOLDER)
        }
        for stale in storage.names(run.path("measured")) - current:
            if not stale.endswith(".parquet"):
                storage.delete(run.path("measured", stale))
        record.samples, record.detail = count + audited, {**detail, "audit_samples": audited}


def measure_extra_shard(context: Context, record: StageRecord, shard: str) -> pa.Table:
    """sample_id, label and the scores at checkpoints of one more shard in `seed/`, of samples outside the seed set.

    The stage must be done: its checkpoints and mean gradients are used, and nothing is left in `measured/`.
    """
    config, run = context.config, context.run
    parts, folder = proxy_parts(run), GradientFolders.of(config, run).checkpoints
    for part in parts:
        measure_shards(context, record, part, smallest_part(parts), [shard], lambda samples: None)
    moso = None
    if "moso" in config.measure.at_checkpoints:
        moso = MosoTotals.of_parts(config, run, parts, folder, seed_manifest(run)["shards"])
    table = _of_checkpoints(config, run, parts, folder, shard, moso, audit=True)
    for part in parts:
        storage.delete(run.path(part.below(folder), f"{shard}.parquet"))
    return table


def _announce(context: Context) -> dict[str, Any]:
    """Say what `self_term: auto` decided, and which layers have no fast rule for per-sample gradients; both for the ledger."""
    config, samples = context.config, smallest_part(proxy_parts(context.run))
    moso, grand = config.measure.moso, config.measure.grand
    self_term = "moso" in config.measure.scores and moso.uses_self_term(samples)
    if "moso" in config.measure.scores and moso.self_term == "auto":
        side = (
            f"below {SELF_TERM_BELOW:,}: with"
            if self_term
            else f"{SELF_TERM_BELOW:,} or more: without"
        )
        context.progress.say(f"{'measure':<11} self term: {samples:,} samples are {side} it")
    slow: list[str] = []
    if (self_term and moso.gradient == "all") or (
        "grand" in config.measure.scores and grand.gradient == "all"
    ):
        from raypipe.scores.per_sample import slow_parameters

        slow = slow_parameters(empty_proxy(context.run))
    if slow:
        context.progress.say(
            f"{'measure':<11} {len(slow)} weights have no fast per-sample rule and take a slower, exact way: {slow[0]}, ..."
        )
    return {"slow_parameters": slow} if slow else {}


def _of_checkpoints(
    config: Config,
    run: Run,
    parts: list[SeedPart],
    folder: str,
    shard: str,
    moso: list[MosoTotals] | None,
    audit: bool = False,
) -> pa.Table:
    """sample_id, label and the scores at checkpoints of one shard, each sample's from the proxy of its own part."""
    tables = []
    for number, part in enumerate(parts):
        found = read_numbers(run, part.below(folder), shard)
        table = found.select(["sample_id", "label"])
        if moso is not None:
            table = table.append_column(
                "moso", pa.array(moso[number].score(found, audit), pa.float32())
            )
        if "grand" in config.measure.scores:
            table = table.append_column(
                "grand", pa.array(numbers_in(found, "lengths").mean(1).astype(np.float32))
            )
        for score in (score for score in config.measure.at_checkpoints if score in OUTPUTS):
            table = table.append_column(
                score,
                pa.array(
                    _mean(config, part, numbers_in(found, OUTPUTS[score]), score), pa.float32()
                ),
            )
        tables.append(table)
    return merge_parts(run, parts, shard, tables)


def _mean(config: Config, part: SeedPart, numbers: np.ndarray, score: str) -> np.ndarray:
    """Mean over the checkpoints among the epochs that are asked for; numbers float64 [n, checkpoints], returns float32 [n]."""
    settings = config.measure.settings_of(score)
    assert isinstance(settings, MeanSettings)
    chosen = [
        column
        for column, item in enumerate(part.trained["checkpoints"])
        if settings.takes(item["epoch"])
    ]
    return numbers[:, chosen].mean(1).astype(np.float32)


def _combine(config: Config, run: Run, folder: str, shard: str, given: list[pa.Table]) -> int:
    """Write the scores of one shard, which tables of the same samples have among them; returns its samples."""
    columns = {
        score: table[score].to_numpy() for table in given for score in table.column_names[2:]
    }
    table = given[0].select(["sample_id", "label"])
    for score in (score for score in config.measure.scores if score in columns):
        bad = int((~np.isfinite(columns[score])).sum())
        if bad:
            raise StageError(
                f"{score} of {bad} samples of {shard} is not finite: the proxy's training diverged; lower proxy.lr"
            )
        table = table.append_column(score, pa.array(columns[score], pa.float32()))
    storage.write_table(run.path(folder, f"{shard}.parquet"), table)
    return len(table)
