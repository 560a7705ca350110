"""Run a function on many units in Ray tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import ray

from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.pending import requesting, resource_shape
from raypipe.storage.fences import fenced

Unit = TypeVar("Unit")
Result = TypeVar("Result")

RECOUNT_SECONDS = 5.0
"""Seconds after which the CPUs of the cluster are counted again."""


def run_tasks(
    units: Iterable[Unit],
    function: Callable[[Unit], Result],
    on_result: Callable[[Result], None],
    *,
    num_cpus: float = 1,
    in_flight: int | None = None,
) -> None:
    """Run a function on every unit in Ray tasks, which are retried when a worker dies.

    Only a few tasks are queued at a time, to limit the memory of the driver. An autoscaler sees the
    tasks queued beyond the CPUs, and the limit grows with the nodes that it adds.

    Parameters
    ----------
    units : iterable
        Arguments of the function, one per task.
    function : callable
        Runs in a task.
    on_result : callable
        Called in the driver with each result, in the order of completion.
    num_cpus : float
        CPUs of a task.
    in_flight : int, optional
        Tasks submitted at a time. Default: four per CPU of the cluster.

    Raises
    ------
    RaypipeError
        What the function raises.
    """
    remote = ray.remote(num_cpus=num_cpus, max_retries=-1)(_call)
    shared = ray.put(fenced(function))
    limit, counted_at = in_flight or 0, -math.inf
    waiting: list[Any] = []
    queue = iter(units)
    exhausted = False
    while True:
        if in_flight is None and not exhausted and time.monotonic() - counted_at > RECOUNT_SECONDS:
            cpus = ray.cluster_resources().get("CPU", 0)
            limit, counted_at = max(4, int(4 * cpus / max(num_cpus, 0.1))), time.monotonic()
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


def _call(function: Callable[[Unit], Result], unit: Unit) -> Result:
    return function(unit)
