"""Values are added in a tree whose shape depends only on their number, and few are held."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raypipe.distributed import tree_sum
from raypipe.distributed.cluster import ActorPool
from raypipe.distributed.tree_sum import FAN_IN, TreeSum
from raypipe.runs.partition import SeedPart
from raypipe.runs.unit_result import UnitResult
from raypipe.stages.measure import mean_gradient
from raypipe.stages.measure.gradient_job import GradientFolders, GradientJob


def _all_at_once(column: list[str]) -> str:
    """The same tree, built from all values at once."""
    while len(column) > 1:
        column = [
            "(" + "+".join(column[start : start + FAN_IN]) + ")"
            for start in range(0, len(column), FAN_IN)
        ]
    return column[0]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 15, 16, 17, 21, 64, 69])
def test_the_tree_is_that_of_all_values_at_once(count: int) -> None:
    held: set[str] = set()
    most = 0

    def merge(*values: str) -> str:
        held.difference_update(values)
        merged = "(" + "+".join(values) + ")"
        held.add(merged)
        return merged

    total, begun = TreeSum(merge), 0
    for number in range(count):
        held.add(str(number))
        begun += len(total.add(str(number)))
        most = max(most, len(held))
    assert begun == count // FAN_IN + count // FAN_IN**2 + count // FAN_IN**3
    assert total.whole() == _all_at_once([str(number) for number in range(count)])
    assert len(held) == 1 and most <= 3 * (FAN_IN - 1) + 1


class _Serial:
    """Replaces Ray: results are computed at once and are their own references.

    `most` is the largest number of groups waited for at a time.
    """

    def __init__(self) -> None:
        self.most = 0

    def remote(self, **options: Any) -> Any:
        return lambda function: SimpleNamespace(remote=function)

    def put(self, value: Any) -> Any:
        return value

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def wait(self, waiting: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        groups = [item for item in waiting if isinstance(item, UnitResult)]
        self.most = max(self.most, len(groups))
        return waiting[:1], waiting[1:]

    def get(self, references: Any) -> Any:
        return references


def test_every_group_is_in_the_sum_of_every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, files, stored = [str(number) for number in range(30)], ["first", "second", "third"], {}

    def sums(job: GradientJob, files: list[str], group: list[str]) -> list[Any]:
        values = [
            {"weight": np.full(3, sum(map(int, group)) * (place + 1.0))}
            for place in range(len(files))
        ]
        return [*values, UnitResult(samples=len(group), cpu_seconds=0.5)]

    def store(job: GradientJob, file: str, total: dict[str, np.ndarray]) -> None:
        stored[file] = total["weight"].tolist(), job.part.samples

    serial, done = _Serial(), list[int]()
    monkeypatch.setattr(tree_sum, "ray", serial)
    monkeypatch.setattr(mean_gradient, "_sum_gradients", sums)
    monkeypatch.setattr(mean_gradient, "_store_mean", store)
    worker: Any = None
    job = GradientJob(worker, GradientFolders("", "", ""), SeedPart(0, 1, 0, 99, ()), False)
    pool = ActorPool(1, 1, 0.5, 0, 1, 0.5, 1)
    seconds = mean_gradient.write_mean_gradients(job, files, shards, pool, done.append)
    assert seconds == 15 and done == [1] * 30
    assert stored == {file: ([435.0 * (place + 1)] * 3, 99) for place, file in enumerate(files)}
    assert serial.most <= 4 + FAN_IN, "of 4 that can run, and a few that wait"
