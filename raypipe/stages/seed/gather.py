"""Gather drawn samples into canonical seed shards. Runs in tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.drawn_samples import read_drawn
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import audit_name, distinguished_classes, shard_table
from raypipe.runs.unit_result import UnitResult
from raypipe.stages.seed.plan import ShardGroup


@dataclass(frozen=True)
class GatherResult(UnitResult):
    """What a task reports of a group of shards: their number, and the samples in them."""

    shards: int = 0


def gather_shards(
    config: Config, run_uri: str, drawn: Sequence[str], shards: int, group: ShardGroup
) -> GatherResult:
    """Write some of the seed shards, and their audit shards, from all drawn files.

    Parameters
    ----------
    config, run_uri
        The configuration and the run folder.
    drawn
        Names of all drawn files.
    shards
        Number of all seed shards.
    group
        Those to write.
    """
    watch, run = Stopwatch(), Run(run_uri)
    size, classes = config.proxy.image_size, run.classes()
    samples, shard = read_drawn(run, drawn, size, shards, group.first, group.stop)
    extra: dict[str, Any] = {"unlabelled": True} if classes.clusters else {}
    for number, name in enumerate(group.names, group.first):
        in_shard = shard == number
        for file, mask in (
            (name, in_shard & ~samples.audit),
            (audit_name(name), in_shard & samples.audit),
        ):
            part = samples.take(np.flatnonzero(mask))
            table = shard_table(
                part.ids,
                part.labels.tolist(),
                part.images,
                distinguished_classes(classes),
                size,
                extra,
            )
            storage.write_table(run.seed_shard(file), table)
    return GatherResult(
        group.names[0],
        len(samples.ids),
        cpu_seconds=watch.lap(),
        shards=len(group.names),
    )
