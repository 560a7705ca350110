"""A driver whose actors sleep in every unit. Their files show which node did which unit, and when.

    python slow_units.py FOLDER UNITS NODES [gpu]

Writes FOLDER/<unit>-<node> for every unit, with the process id as content; with `gpu`, three
processes share a GPU. Units are quick once NODES nodes have worked. At the end it prints the
resources still in use.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from raypipe.config import ClusterSettings, PoolSettings
from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.cluster import connect
from raypipe.progress import Progress
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult


def read(unit: int) -> Batch:
    return {"unit": np.array([unit])}


class Slow:
    """Sleeps for a second per unit until `nodes` nodes have finished a unit."""

    def __init__(self, folder: str, nodes: int) -> None:
        self._folder, self._nodes = folder, nodes

    def __call__(self, unit: str, batch: Batch) -> UnitResult:
        import ray

        node = int(ray.get_runtime_context().get_node_id(), 16)
        there = {name.partition("-")[2] for name in os.listdir(self._folder)}
        time.sleep(1 if len(there) < self._nodes else 0.1)
        Path(self._folder, f"{unit}-{node}").write_text(str(os.getpid()))
        return UnitResult(unit)


def main(folder: str, units: int, nodes: int, gpu: bool) -> None:
    import ray

    progress = Progress(quiet=True)
    cluster = connect(
        ClusterSettings(address="auto"), Run("s3://unused/run"), progress, verbose=False
    )
    pool = (
        cluster.pool(PoolSettings(use_gpu=True, actors_per_gpu=3))
        if gpu
        else cluster.cpu_pool("auto")
    )
    done: list[UnitResult] = []
    make = functools.partial(Slow, folder, nodes)
    stream(list(range(units)), read, make, pool, 200, done.append)
    end = time.monotonic() + 20
    while _busy() and time.monotonic() < end:
        time.sleep(0.2)
    told = {
        "joined": cluster.joined,
        "can_grow": cluster.can_grow,
        "units": [int(result.unit) for result in done],
        "busy": _busy(),
    }
    print(json.dumps(told), flush=True)
    ray.shutdown()


def _busy() -> list[str]:
    """Resources of the cluster in use: living actors of pools, and CPUs."""
    import ray
    from ray._private.state import actors

    living = [item["ActorClassName"] for item in actors().values() if item["State"] != "DEAD"]
    free, total = ray.available_resources().get("CPU", 0.0), ray.cluster_resources().get("CPU", 0.0)
    return [name for name in living if "MapWorker" in name] + (
        [f"{total - free:g} CPUs"] if free < total else []
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "gpu" in sys.argv[4:])
