"""A driver whose actors wait in every unit, which costs no processor; a test sees in their files which node did which unit, and when.

    python slow_units.py FOLDER UNITS NODES [gpu]

Writes FOLDER/<unit>-<node> for every unit, with the process in it; with `gpu`, three processes share one. Once so many nodes have worked,
units are quick. At the end it prints what was given back.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.config import ClusterSettings, PoolSettings
from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.cluster import connect
from raypipe.progress import Progress
from raypipe.runs.layout import Run


def read(unit: int) -> Batch:
    return {"unit": np.array([unit])}


class Slow:
    """Waits a second in a unit until `nodes` nodes have done some."""

    def __init__(self, folder: str, nodes: int) -> None:
        self._folder, self._nodes = folder, nodes

    def __call__(self, batch: Batch) -> Batch:
        import ray

        unit, node = int(batch["unit"][0]), int(ray.get_runtime_context().get_node_id(), 16)
        there = {name.partition("-")[2] for name in os.listdir(self._folder)}
        time.sleep(1 if len(there) < self._nodes else 0.1)
        Path(self._folder, f"{unit}-{node}").write_text(str(os.getpid()))
        return {"unit": np.array([unit])}


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
    done: list[dict[str, Any]] = []
    stream(
        list(range(units)), read, Slow, {"folder": folder, "nodes": nodes}, pool, 200, done.append
    )
    end = time.monotonic() + 20
    while _busy() and time.monotonic() < end:
        time.sleep(0.2)
    told = {
        "joined": cluster.joined,
        "can_grow": cluster.can_grow,
        "units": [row["unit"] for row in done],
        "busy": _busy(),
    }
    print(json.dumps(told), flush=True)
    ray.shutdown()


def _busy() -> list[str]:
    """What of the cluster is in use: actors of pools that live, and CPUs that are taken."""
    import ray
    from ray._private.state import actors

    living = [item["ActorClassName"] for item in actors().values() if item["State"] != "DEAD"]
    free, total = ray.available_resources().get("CPU", 0.0), ray.cluster_resources().get("CPU", 0.0)
    return [name for name in living if "MapWorker" in name] + (
        [f"{total - free:g} CPUs"] if free < total else []
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "gpu" in sys.argv[4:])
