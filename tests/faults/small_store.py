"""Measure the peak use of a small object store, in a Ray cluster of its own; print it as JSON.

    python small_store.py

The object store holds only a few units of work. `test_back_pressure.py` runs this in a process of
its own, because a process has one cluster. Two workloads, sizes in megabytes:

stream  UNITS units of size UNIT are read and passed to a slower actor
sums    gradients of UNITS groups of seed shards, MODEL each at two checkpoints, are added
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from raypipe.distributed import tree_sum
from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.cluster import ActorPool
from raypipe.runs.partition import SeedPart
from raypipe.runs.unit_result import UnitResult
from raypipe.stages.measure import mean_gradient
from raypipe.stages.measure.gradient_job import GradientFolders, GradientJob

STORE, UNIT, MODEL, UNITS = 80, 12, 4, 40
ROW = 3 * 64 * 64
APART = ActorPool(
    min_actors=1, max_actors=1, num_cpus=0.5, num_gpus=0, threads=1, read_cpus=0.25, room=1
)
"""Reading and computing request different shares, as with a GPU, so that Ray Data does not fuse
them and units pass through the object store."""


def read(unit: int) -> Batch:
    rows = (UNIT << 20) // ROW
    return {"image": np.full((rows, 3, 64, 64), unit, np.uint8)}


class Slow:
    def __call__(self, unit: str, batch: Batch) -> UnitResult:
        time.sleep(0.1)
        assert (batch["image"][-1] == int(unit)).all()
        return UnitResult(unit)


def streamed() -> list[int]:
    """Stream all units; return those that arrived."""
    seen: list[int] = []
    stream(range(UNITS), read, Slow, APART, 60, lambda result: seen.append(int(result.unit)))
    return sorted(seen)


def summed() -> list[float]:
    """Return the sum at each checkpoint, and the number of reported groups."""
    reported: list[int] = []
    with (
        mock.patch.object(mean_gradient, "_sum_gradients", _sums),
        mock.patch.object(mean_gradient, "_store_mean", _last),
        mock.patch.object(tree_sum.ray, "get", side_effect=_keeping(kept := [])),
    ):
        worker: Any = None
        job = GradientJob(worker, GradientFolders("", "", ""), SeedPart(0, 1, 0, UNITS, ()), False)
        shards = [str(unit) for unit in range(UNITS)]
        mean_gradient.write_mean_gradients(job, ["first", "second"], shards, APART, reported.append)
    return [*kept[-1], sum(reported)]


def _keeping(kept: list[Any]) -> Callable[..., Any]:
    """`ray.get`, recording its results."""
    get = ray.get

    def call(*args: Any, **kwargs: Any) -> Any:
        kept.append(get(*args, **kwargs))
        return kept[-1]

    return call


def _sums(job: GradientJob, files: list[str], shards: list[str]) -> list[Any]:
    time.sleep(0.1)
    sums = [
        {"weight": np.full(MODEL << 18, int(shard) * (number + 1), np.float32)}
        for shard in shards
        for number in range(len(files))
    ]
    return [*sums, UnitResult(samples=1)]


def _last(job: GradientJob, file: str, total: dict[str, np.ndarray]) -> float:
    return float(total["weight"][-1])


class Watch(threading.Thread):
    """Watches the object store; `most` has the peaks since it was last cleared, in megabytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, float] = {}
        self._state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self._over = threading.Event()

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.02):
            found = get_memory_info_reply(self._state).store_stats
            now = {
                "used": found.object_store_bytes_used,
                "fallback": found.object_store_bytes_fallback,
                "spilled": found.spilled_bytes_total,
            }
            self.most = {
                name: max(self.most.get(name, 0.0), value / 2**20) for name, value in now.items()
            }


def main() -> None:
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=STORE << 20,
        log_to_driver=False,
        logging_level="error",
    )
    watch, found = Watch(), {}
    watch.start()
    for name, work in (("stream", streamed), ("sums", summed)):
        watch.most = {}
        found[name] = {"result": work(), **watch.most}
    watch.stop()
    print(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main()
