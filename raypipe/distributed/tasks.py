"""Run a function on many units in Ray tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray

from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.pending import requesting, resource_shape
from raypipe.storage.fences import fenced

RECOUNT_SECONDS = 5.0
"""Seconds after which the CPUs of the cluster are counted again."""


def run_tasks(
    units: Iterable[Any],
    function: Callable[[Any], dict[str, Any]],
    on_result: Callable[[dict[str, Any]], None],
    *,
    num_cpus: float = 1,
    in_flight: int | None = None,
) -> None:
    """Run a function on every unit in Ray tasks, retried when a worker dies; few are queued, so the driver stays small.

    What is queued beyond the CPUs is what an autoscaler sees, and grows with the nodes that it brings.
    """
    remote = ray.remote(num_cpus=num_cpus, max_retries=-1)(_call)
    shared = ray.put(fenced(function))
    limit, looked = in_flight or 0, -math.inf
    waiting: list[Any] = []
    queue = iter(units)
    exhausted = False
    while True:
        if in_flight is None and not exhausted and time.monotonic() - looked > RECOUNT_SECONDS:
            limit, looked = (
                max(4, int(4 * ray.cluster_resources().get("CPU", 0) / max(num_cpus, 0.1))),
                time.monotonic(),
            )
        while not exhausted and len(waiting) < limit:
            try:
                waiting.append(remote.remote(shared, next(queue)))
            except StopIteration:
                exhausted = True
        if not waiting:
            return
        try:
            with requesting(resource_shape(num_cpus)):
                ready, waiting = ray.wait(waiting)
            for result in ray.get(ready):
                on_result(result)
        except Exception as error:
            raise as_raypipe_error(error) from error


def _call(function: Callable[[Any], dict[str, Any]], unit: Any) -> dict[str, Any]:
    return function(unit)
