"""Sum large values in a tree of Ray tasks.

The shape of the tree depends only on the number of values, so that the result does not depend on
the number of workers. The driver holds references, never values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from raypipe.distributed.cluster import ActorPool
from raypipe.distributed.failures import as_raypipe_error
from raypipe.runs.unit_result import UnitResult
from raypipe.storage.fences import fenced

FAN_IN = 4
"""Values that one task adds up."""


def tree_sums(
    groups: Sequence[Any],
    keys: Sequence[str],
    sum_group: Callable[[Any], list[Any]],
    merge: Callable[..., Any],
    store: Callable[[str, Any], None],
    pool: ActorPool,
    on_report: Callable[[UnitResult], None],
) -> None:
    """Add up the values that tasks compute for groups of units, by key, and store the totals.

    Parameters
    ----------
    groups
        Units of work; one task computes the values of one group.
    keys
        Names of the totals.
    sum_group
        group -> one value per key, then a report for the driver.
    merge
        Adds up to `FAN_IN` values.
    store
        Called in a task with a key and its total.
    pool
        What share of a machine each task takes.
    on_report
        Called in the driver with the report of each group.

    Raises
    ------
    StageError
        When a task fails; MemoryShortageError when workers ran out of memory.
    """
    share = {"num_cpus": pool.num_cpus, "max_retries": -1}
    sum_task = ray.remote(num_gpus=pool.num_gpus, num_returns=len(keys) + 1, **share)(_call)
    merge_task, store_task = ray.remote(**share)(merge), ray.remote(**share)(fenced(_call))
    shared_sum, shared_store = ray.put(sum_group), ray.put(store)
    totals = [TreeSum(merge_task.remote) for _ in keys]
    running, merging = list[Any](), list[Any]()

    def wait_for_one() -> None:
        nonlocal running
        ready, running = ray.wait(running)
        for report in ray.get(ready):
            on_report(report)

    try:
        for group in groups:
            # a value is as large as a network; those of all groups would fill the object store
            room = _room(pool)
            while len(running) >= room + FAN_IN:
                wait_for_one()
            while len(merging) > len(keys) * (1 + room // FAN_IN):
                _, merging = ray.wait(merging, fetch_local=False)
            *values, report = sum_task.remote(shared_sum, group)
            running.append(report)
            while values:  # popped, because a reference that stays alive keeps the value in memory
                merging += totals[-len(values)].add(values.pop(0))
        stored = [
            store_task.remote(shared_store, key, total.whole())
            for key, total in zip(keys, totals, strict=True)
        ]
        merging.clear()
        while running:
            wait_for_one()
        ray.get(stored)
    except Exception as error:
        raise as_raypipe_error(error) from error


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class TreeSum:
    """Incremental sum of a sequence of values, in a tree whose shape depends only on their number.

    FAN_IN neighbours of a level are added as soon as they exist, so that few values are held.

    Parameters
    ----------
    merge : callable
        Adds up to FAN_IN values.
    """

    def __init__(self, merge: Callable[..., Any]) -> None:
        self._merge = merge
        self._levels: list[list[Any]] = [[]]

    def add(self, value: Any, level: int = 0) -> list[Any]:
        """Add the next value. Return the partial sums that it completes."""
        if level == len(self._levels):
            self._levels.append([])
        self._levels[level].append(value)
        if len(self._levels[level]) < FAN_IN:
            return []
        return self._up(level)

    def _up(self, level: int) -> list[Any]:
        values, self._levels[level] = self._levels[level], []
        merged = self._merge(*values)
        return [merged, *self.add(merged, level + 1)]

    def whole(self) -> Any:
        """Return the sum of all values, of which there must be at least one, and release them."""
        level = 0
        while level < len(self._levels) - 1 or len(self._levels[level]) != 1:
            if self._levels[level]:
                self._up(level)
            level += 1
        return self._levels.pop()[0]


def _room(pool: ActorPool) -> int:
    """Return the number of tasks with the share of an actor that the cluster has room for."""
    total = ray.cluster_resources()
    share = (
        total.get("GPU", 0) / pool.num_gpus
        if pool.num_gpus
        else total.get("CPU", 0) / pool.num_cpus
    )
    return max(1, int(share))
