"""A driver with a unit that needs more memory than its node has, at every attempt.

    python memory_hog.py

Prints the error that the stream of these units ends with.
"""

from __future__ import annotations

import time

import numpy as np

from raypipe.config import ClusterSettings
from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.cluster import ActorPool, connect
from raypipe.errors import RaypipeError
from raypipe.progress import Progress
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult

STEP, STEPS = 1 << 24, 60
"""Numbers per step, 128 MB, and number of steps: 8 GB in total."""


def read(unit: int) -> Batch:
    return {"unit": np.array([unit])}


class Hog:
    def __call__(self, unit: str, batch: Batch) -> UnitResult:
        if unit == "2":
            held = []
            for _ in range(STEPS):
                held.append(np.ones(STEP))
                time.sleep(0.05)
        return UnitResult(unit)


if __name__ == "__main__":
    connect(
        ClusterSettings(address="auto"), Run("s3://unused/run"), Progress(quiet=True), verbose=False
    )
    try:
        stream(
            range(4),
            read,
            Hog,
            ActorPool(1, 1, 1, 0, 1, 1, 1, tasks=True),
            100,
            lambda row: None,
        )
    except RaypipeError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
