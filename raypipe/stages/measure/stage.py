"""Measure: the measured scores of every seed sample.

Writes `measured/<shard>.parquet`: sample_id, label and a float32 column for each of
`measure.scores`; where several proxies score a sample, also a column `<score>_by_proxy`.
They are computed from the files that `raypipe.stages.measure.gradients` and
`raypipe.stages.measure.trajectories` wrote next to it. Writes `measured/audit/<shard>.parquet` with
the scores at checkpoints of the audit set, from its alignments with the mean gradients of the seed
set. Trajectory scores need training on the sample, so the audit set has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import SELF_TERM_BELOW, Config
from raypipe.config.measure import OWN_SCORES
from raypipe.distributed.context import Context
from raypipe.errors import StageError
from raypipe.runs.checkpoints import empty_proxy
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.measured_scores import BY_PROXY
from raypipe.runs.partition import proxy_parts
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import shard_labels
from raypipe.stages.base import Stage
from raypipe.stages.measure.checkpoint_scores import CheckpointScores
from raypipe.stages.measure.gradient_job import GradientFolders, needs_self_term, smallest_part
from raypipe.stages.measure.gradients import measure_gradients
from raypipe.stages.measure.trajectories import measure_trajectories, trajectory_folder
from raypipe.stages.measure.trajectory_scores import TrajectoryScores
from raypipe.stages.network_check import check_forward_mode

AUDIT_FOLDER = "measured/audit"
"""Scores of the audit set."""


class MeasureStage(Stage):
    """Compute the scores of the seed set and the audit set."""

    name = "measure"
    needs = ("proxy",)

    def check(self, context: Context) -> None:
        check_forward_mode(context.config, context.run)

    def settings(self, config: Config) -> dict[str, Any]:
        settings = config.measure
        options = {score: settings.own_options(score) for score in sorted(settings.scores)}
        cross_fit = {"cross_fit": True} if config.proxy.cross_fits else {}
        return options | {
            "precision": settings.precision,
            "recalibrate": settings.recalibrate,
            **cross_fit,
        }

    def clear(self, context: Context) -> None:
        """Remove the scores only.

        The files that they are combined from carry their settings in their names and can be reused.
        """
        for shard in context.run.done("measured"):
            storage.delete(context.run.measured_shard(shard))
        if set(context.config.measure.scores) - set(OWN_SCORES):
            # the name of the folder does not show the code of a score
            storage.delete(context.run.path(trajectory_folder(context.config, context.run)))
        storage.delete(context.run.path(AUDIT_FOLDER))

    def reuses(self, context: Context) -> bool:
        config, run = context.config, context.run
        folders = [trajectory_folder(config, run)] if config.measure.from_trajectory else []
        if config.measure.at_checkpoints:
            folders += vars(GradientFolders.of(config, run)).values()
        return bool(
            {storage.name(folder) for folder in folders} & storage.names(run.measured_folder)
        )

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            seed = SeedManifest.read(context.run)
        except FileNotFoundError:
            return False
        audit = seed.audit_shards if context.config.measure.at_checkpoints else []
        return set(seed.shards) <= context.run.done("measured") and set(audit) <= context.run.done(
            AUDIT_FOLDER
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        at_checkpoints = config.measure.at_checkpoints
        followed: list[str] = list(config.measure.from_trajectory)
        detail: dict[str, Any] = {"scores": list(config.measure.scores)}
        checkpoint_scores, trajectory_scores = None, None
        if at_checkpoints:
            detail |= _announce(context)
            measure_gradients(context, record)
        if followed:
            measure_trajectories(context, record, followed)
        seed = SeedManifest.read(run)
        if at_checkpoints:
            checkpoint_scores = CheckpointScores.read(config, run, seed)
            detail |= checkpoint_scores.ledger_detail()
        if followed:
            trajectory_scores = TrajectoryScores.read(config, run, seed)
        samples = 0
        for shard in seed.shards:
            tables = [checkpoint_scores.of_shard(shard)] if checkpoint_scores else []
            tables += [trajectory_scores.of_shard(shard)] if trajectory_scores else []
            tables = tables or [shard_labels(run, shard)]  # all scores come from embeddings
            samples += _write_scores(config, run, "measured", shard, tables)
        audit_samples = 0
        if checkpoint_scores is not None:
            for shard in seed.audit_shards:
                table = checkpoint_scores.of_shard(shard, audit=True)
                audit_samples += _write_scores(config, run, AUDIT_FOLDER, shard, [table])
        if samples != seed.samples:
            raise StageError(
                f"{samples} of {seed.samples} seed samples were measured; "
                "run again to measure the rest"
            )
        _remove_stale(config, run)
        record.samples = samples + audit_samples
        record.detail = {**detail, "audit_samples": audit_samples}


def _announce(context: Context) -> dict[str, Any]:
    """Print what `self_term: auto` decided, and which layers need slow per-sample gradients.

    Returns what the ledger records of it.
    """
    config, parts = context.config, proxy_parts(context.run)
    moso, grand = config.measure.moso, config.measure.grand
    samples = smallest_part(parts)
    self_term = "moso" in config.measure.scores and needs_self_term(config, parts)
    decides = moso.self_term == "auto" and not config.proxy.cross_fits
    if "moso" in config.measure.scores and decides:
        side = f"fewer than {SELF_TERM_BELOW:,}" if self_term else f"{SELF_TERM_BELOW:,} or more"
        context.progress.say(
            f"{'measure':<11} self term {'on' if self_term else 'off'} "
            f"({samples:,} samples, {side})"
        )
    slow: list[str] = []
    grand_over_all = "grand" in config.measure.scores and grand.gradient == "all"
    if grand_over_all or (self_term and moso.gradient == "all"):
        import torch

        from raypipe.scores.per_sample import slow_parameters

        size = config.proxy.image_size
        image = torch.zeros(1, config.proxy.channels, size, size, dtype=torch.uint8)
        slow = slow_parameters(empty_proxy(context.run), image)
    if not slow:
        return {}
    context.progress.say(
        f"{'measure':<11} {len(slow)} weights have no fast rule for per-sample gradients and use a "
        f"slower, exact one: {slow[0]}, ..."
    )
    return {"slow_parameters": slow}


def _write_scores(
    config: Config, run: Run, folder: str, shard: str, tables: Sequence[pa.Table]
) -> int:
    """Write the scores of one shard from tables of the same samples. Returns their number."""
    columns = {score: table[score] for table in tables for score in table.column_names[2:]}
    result = tables[0].select(["sample_id", "label"])
    for score in (score for score in config.measure.scores if score in columns):
        bad = int((~np.isfinite(columns[score].to_numpy())).sum())
        if bad:
            raise StageError(
                f"{score} of {bad} samples of {shard} is not finite: the proxy's training "
                "diverged; lower proxy.lr"
            )
        result = result.append_column(score, columns[score])
        of_proxies = BY_PROXY.format(score)
        if of_proxies in columns:
            result = result.append_column(of_proxies, columns[of_proxies])
    storage.write_table(run.path(folder, f"{shard}.parquet"), result)
    return len(result)


def _remove_stale(config: Config, run: Run) -> None:
    """Remove folders of other settings below `measured/`."""
    folders = GradientFolders.of(config, run)
    paths = (*vars(folders).values(), trajectory_folder(config, run), AUDIT_FOLDER)
    current = {storage.name(path) for path in paths}
    for stale in storage.names(run.measured_folder) - current:
        if not stale.endswith(".parquet"):
            storage.delete(storage.join(run.measured_folder, stale))
