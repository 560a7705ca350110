"""A unit whose worker always dies: the stage ends with an error instead of retrying forever."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import pytest
import ray

from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.cluster import ActorPool
from raypipe.errors import StageError
from raypipe.runs.unit_result import UnitResult


def read(unit: int) -> Batch:
    return {"unit": np.array([unit])}


class Dies:
    def __call__(self, unit: str, batch: Batch) -> UnitResult:
        if unit == "2":
            os._exit(1)
        return UnitResult(unit)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("tasks", [True, False], ids=["tasks", "actors"])
def test_it_is_given_up_after_a_while(cluster: str, tasks: bool) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    seen: list[int] = []
    started = time.monotonic()
    with pytest.raises(StageError, match=r"no unit of work was finished .* keep dying"):
        stream(
            range(4),
            read,
            Dies,
            ActorPool(1, 2, 1, 0, 1, 1, 2, tasks),
            20,
            lambda row: seen.append(int(row.unit)),
        )
    assert time.monotonic() - started < 150
    assert 2 not in seen
