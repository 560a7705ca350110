"""Run functions on shares of machines and on every node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.pending import requesting, resource_shape
from raypipe.storage.fences import fenced

Result = TypeVar("Result")


def run_on_share(
    units: Sequence[Any],
    function: Callable[[Any], Result],
    on_result: Callable[[Result], None],
    cpus: float,
    gpus: float,
    label_selector: dict[str, str] | None = None,
) -> None:
    """Run a function on every unit in Ray tasks, each with a share of a machine.

    Tasks are retried when a worker dies.

    Parameters
    ----------
    units : sequence
        Arguments of the function, one per task.
    function : callable
        Runs in a task.
    on_result : callable
        Called in the driver with each result.
    cpus, gpus : float
        Share of a machine of each task.
    label_selector : dict of str to str, optional
        Labels of the nodes that the tasks can run on.

    Raises
    ------
    RaypipeError
        What the function raises. The other tasks are cancelled.
    """
    remote = ray.remote(
        num_cpus=cpus, num_gpus=gpus, label_selector=label_selector, max_retries=-1
    )(fenced(_call))
    shared = ray.put(function)
    waiting = [remote.remote(shared, unit) for unit in units]
    try:
        with requesting(resource_shape(cpus, gpus)):
            while waiting:
                ready, waiting = ray.wait(waiting)
                for result in ray.get(ready):
                    on_result(result)
    except Exception as error:
        raise as_raypipe_error(error) from error
    finally:
        for task in waiting:  # after a failure or interrupt; files that they wrote are kept
            ray.cancel(task, force=True)


def _call(function: Callable[[Any], Result], unit: Any) -> Result:
    return function(unit)


def on_each_node(function: Callable[[], None]) -> None:
    """Run a function on every living node; skip nodes that cannot be reached."""
    living = [node["NodeID"] for node in ray.nodes() if node.get("Alive")]
    remote = ray.remote(num_cpus=0, max_retries=0)(_plain)
    tasks = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            function
        )
        for node in living
    ]
    ray.wait(tasks, num_returns=len(tasks), timeout=60)


def _plain(function: Callable[[], None]) -> None:
    function()


def smallest_memory() -> float:
    """Return the memory of the smallest living node with CPUs, as Ray accounts it, in bytes.

    Infinity if Ray does not report it.
    """
    alive = [
        node["Resources"]
        for node in ray.nodes()
        if node.get("Alive") and node["Resources"].get("CPU", 0) > 0
    ]
    accounted = (node.get("memory", 0.0) + node.get("object_store_memory", 0.0) for node in alive)
    return min(accounted, default=0.0) or float("inf")
