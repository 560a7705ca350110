"""A scored run that was written without Ray, and trainings one by one in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import serial
from helpers import small_config
from serial import no_ray
from sklearn.datasets import load_digits

from raypipe import storage
from raypipe.distributed.cluster import Cluster
from raypipe.distributed.context import Context
from raypipe.evaluation import driver
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run

__all__ = ["no_ray"]


def _in_turn(
    units: Sequence[Any], function: Callable[[Any], Any], on_result: Callable[[Any], None], *_: Any
) -> None:
    for unit in units:
        on_result(function(unit))


@pytest.fixture
def scored_run(tmp_path: Path) -> Run:
    """The first 200 digits in two fragments, with invented scores; all but two have a label.

    The test set is the other digits.
    """
    config = small_config(str(tmp_path / "run"), "source.limit=200")
    run = Run(config.run)
    run.write_config(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raypipe.distributed.tasks.run_tasks", serial.run_tasks)
        patch.setattr(Context, "cluster", None)
        serial.index(config)
    random, digits = np.random.default_rng(0), load_digits()
    for fragment in run.fragments():
        rows, count = np.arange(fragment.start, fragment.stop), fragment.samples
        ids = [f"digits/{row:04d}" for row in rows]
        labels = pa.array(digits.target[rows].astype(np.int32), pa.int32(), mask=rows >= 198)
        score = random.normal(size=count).astype(np.float32)
        numbers = {
            "score": score,
            "lower": score - 1,
            "upper": score + 1,
            "measured": np.zeros(count, bool),
        }
        storage.write_table(
            run.path("scores", f"{fragment.fragment_id}.parquet"),
            pa.table({"sample_id": ids, "label": labels, **numbers}),
        )
        losses = {
            "sample_id": ids,
            "loss": random.random(count).astype(np.float32),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(digits.data[rows].astype(np.float16).reshape(-1)), 64
            ),
        }
        storage.write_table(
            run.path("embeddings", f"{fragment.fragment_id}.parquet"), pa.table(losses)
        )
    seconds = {
        "index": 1.0,
        "seed": 2.0,
        "proxy": 30.0,
        "measure": 4.0,
        "embed": 5.0,
        "extrapolate": 6.0,
        "select": 100.0,
    }
    records = {
        stage: StageRecord("done", stage, samples=200, cpu_seconds=each)
        for stage, each in seconds.items()
    }
    records["extrapolate"].detail = {"score": "moso", "measured": 0}
    run.write_ledger(records)
    return run


@pytest.fixture
def scored(scored_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`scored_run`, decoded and trained on in this process, on a fake cluster of two CPUs."""
    monkeypatch.setattr("raypipe.distributed.tasks.run_tasks", serial.run_tasks)
    monkeypatch.setattr(Context, "cluster", Cluster(2.0, 0.0, 1, 2.0, False))
    monkeypatch.setattr(driver, "run_on_share", _in_turn)
    monkeypatch.setattr(driver, "smallest_memory", lambda: 2.0**30)
    monkeypatch.setattr(driver, "on_each_node", lambda function: function())
    return scored_run
