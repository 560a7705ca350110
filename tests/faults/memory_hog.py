"""A driver one of whose units needs more memory than its node gives, however often it is tried.

    python memory_hog.py

Prints the error that the stream of these units ends with.
"""

from __future__ import annotations

import time

import numpy as np

from raypipe.config import ClusterSettings
from raypipe.errors import RaypipeError
from raypipe.progress import Progress
from raypipe.rundir import Run
from raypipe.stages.cluster import Pool, connect
from raypipe.stages.streaming import Columns, stream

STEP, STEPS = 1 << 24, 60
"""Numbers that are added at a time, 128 MB, and how often: 8 GB."""


def read(unit: int) -> Columns:
    return {"unit": np.array([unit])}


class Hog:
    def __call__(self, batch: Columns) -> Columns:
        if batch["unit"][0] == 2:
            held = []
            for _ in range(STEPS):
                held.append(np.ones(STEP))
                time.sleep(0.05)
        return batch


if __name__ == "__main__":
    connect(ClusterSettings(address="auto"), Run("s3://unused/run"), Progress(quiet=True), verbose=False)
    try:
        stream(range(4), read, Hog, {}, Pool(1, 1, 1, 0, 1, 1, 1, tasks=True), 100, lambda row: None)
    except RaypipeError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
