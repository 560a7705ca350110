"""The scores at checkpoints of the seed set and the audit set, averaged over proxies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.config import Config, MeanSettings
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import SeedPart, merge_parts, proxy_parts
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import shard_labels
from raypipe.stages.measure.common_scale import CommonScale, join_proxies
from raypipe.stages.measure.gradient_job import GradientFolders, measured_checkpoints
from raypipe.stages.measure.moso import MosoTotals, checkpoint_column, read_shard_table
from raypipe.stages.measure.outputs import OUTPUTS


@dataclass(frozen=True)
class CheckpointScores:
    """The scores at checkpoints, combined from the values of `raypipe.stages.measure.gradients`.

    Attributes
    ----------
    config, run
        The configuration and the run.
    parts : list of SeedPart
        Every proxy with its part of the seed set.
    folder : str
        Folder of the values, below the run.
    moso : list of MosoTotals or None
        Totals of each proxy; None when MoSo is not measured.
    scales : list of CommonScale or None
        Brings the scores of each proxy to a common scale; None where one proxy scores a sample.
    """

    config: Config
    run: Run
    parts: list[SeedPart]
    folder: str
    moso: list[MosoTotals] | None
    scales: list[CommonScale] | None = None

    @classmethod
    def read(cls, config: Config, run: Run, seed: SeedManifest) -> CheckpointScores:
        """Read the totals over the seed set that MoSo needs."""
        parts, folder = proxy_parts(run), GradientFolders.of(config, run).checkpoints
        moso = None
        if "moso" in config.measure.at_checkpoints:
            moso = MosoTotals.of_parts(config, run, parts, folder, seed.shards)
        scores = cls(config, run, parts, folder, moso)
        if ProxyRoles.of(config).single:
            return scores
        by_proxy = [scores._tables(number, seed.shards) for number in range(len(parts))]
        return replace(scores, scales=CommonScale.of_proxies(by_proxy))

    def ledger_detail(self) -> dict[str, Any]:
        """Return what the ledger records of MoSo."""
        if self.moso is None:
            return {}
        details = [totals.ledger_detail() for totals in self.moso]
        return {"moso": details[0] if len(details) == 1 else {"parts": details}}

    def of_shard(self, shard: str, audit: bool = False) -> pa.Table:
        """Return sample_id, label and the scores of one shard.

        Each sample's scores come from the proxies of its own part, or with cross-fitting from those
        of all other parts; see `join_proxies`.
        """
        tables = [self.of_proxy(number, shard, audit) for number in range(len(self.parts))]
        if self.scales is None:
            return merge_parts(self.run, self.parts, shard, tables)
        return join_proxies(shard_labels(self.run, shard), tables, self.scales)

    def _tables(self, number: int, shards: Sequence[str]) -> Iterator[pa.Table]:
        return (self.of_proxy(number, shard) for shard in shards)

    def of_proxy(self, number: int, shard: str, audit: bool = False) -> pa.Table:
        """Return sample_id, label and the scores of the samples that one proxy measured."""
        measure, part = self.config.measure, self.parts[number]
        values = read_shard_table(self.run, part.below(self.folder), shard)
        table = values.select(["sample_id", "label"])
        if self.moso is not None:
            moso = pa.array(self.moso[number].score(values, audit), pa.float32())
            table = table.append_column("moso", moso)
        if "grand" in measure.scores:
            lengths = checkpoint_column(values, "lengths")
            table = table.append_column("grand", pa.array(lengths.mean(1).astype(np.float32)))
        for score in (score for score in measure.at_checkpoints if score not in ("moso", "grand")):
            mean = _mean(self.config, part, checkpoint_column(values, OUTPUTS[score]), score)
            table = table.append_column(score, pa.array(mean, pa.float32()))
        return table


def _mean(config: Config, part: SeedPart, values: np.ndarray, score: str) -> np.ndarray:
    """Return the mean over the checkpoints among the epochs of the settings, float32 [n].

    `values` is float64 [n, checkpoints].
    """
    settings = config.measure.settings_of(score)
    assert isinstance(settings, MeanSettings)
    measured = measured_checkpoints(config, part)
    chosen = [column for column, item in enumerate(measured) if settings.takes(item.epoch)]
    return values[:, chosen].mean(1).astype(np.float32)
