"""The trajectory scores of the seed set, averaged over the repeats of each part's proxy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from raypipe.config import Config
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import SeedPart, proxy_parts
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import shard_labels
from raypipe.stages.measure.common_scale import CommonScale, join_proxies
from raypipe.stages.measure.moso import read_shard_table
from raypipe.stages.measure.trajectories import repeat_folder, trajectory_folder


@dataclass(frozen=True)
class TrajectoryScores:
    """The scores that `raypipe.stages.measure.trajectories` wrote.

    Attributes
    ----------
    run
        The run.
    parts : list of SeedPart
        Every proxy with its part of the seed set.
    folder : str
        Folder of the scores, below the run.
    scales : list of CommonScale or None
        Brings the scores of each proxy to a common scale; None without repeats.
    """

    run: Run
    parts: list[SeedPart]
    folder: str
    scales: list[CommonScale] | None = None

    @classmethod
    def read(cls, config: Config, run: Run, seed: SeedManifest) -> TrajectoryScores:
        """Read what averaging needs to know of all seed samples."""
        scores = cls(run, proxy_parts(run), trajectory_folder(config, run))
        if config.proxy.repeats == 1:
            return scores
        by_proxy = [scores._tables(number, seed.shards) for number in range(len(scores.parts))]
        return replace(scores, scales=CommonScale.of_proxies(by_proxy))

    def of_shard(self, shard: str) -> pa.Table:
        """Return sample_id, label and the scores of one shard.

        Each sample's scores come from the proxies of its own part; see `join_proxies`.
        """
        if self.scales is None:
            return read_shard_table(self.run, self.folder, shard)
        tables = [self.of_proxy(number, shard) for number in range(len(self.parts))]
        return join_proxies(shard_labels(self.run, shard), tables, self.scales)

    def _tables(self, number: int, shards: Sequence[str]) -> Iterator[pa.Table]:
        return (self.of_proxy(number, shard) for shard in shards)

    def of_proxy(self, number: int, shard: str) -> pa.Table:
        """Return sample_id, label and the scores of the samples that one proxy was trained on."""
        part = self.parts[number]
        folder = repeat_folder(self.folder, part.repeat, part.repeats)
        table = read_shard_table(self.run, folder, shard)
        return table.take(pa.array(part.rows(table["sample_id"].to_pylist())))
