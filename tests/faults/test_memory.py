"""Memory shortages of workers are reported as such, with the stage and the setting to lower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from helpers import QUIET, small_config
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.train import WorkerGroupError

from raypipe import pipeline
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.failures import as_raypipe_error
from raypipe.errors import MemoryShortageError, StageError, StorageError, TakenOverError
from raypipe.runs.ledger import StageRecord
from raypipe.stages.base import Stage

LOW = (
    "Task was killed due to the node running low on memory. "
    "Memory on the node (IP: 10.0.0.1) was 15.3GB / 16.0GB (0.956)"
)
POSSIBLY = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
    "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. "
    "Some common causes include: (1) the process was killed by the OOM killer due to high memory "
    "usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV "
    "or another unexpected error."
)


def task_error(cause: Exception) -> Exception:
    """The error that `ray.get` raises."""
    return ray.exceptions.RayTaskError(
        "embed", f"Traceback\n{type(cause).__name__}: {cause}", cause
    ).as_instanceof_cause()


def actor_error(line: str) -> Exception:
    """The same for an actor of Ray Data, which keeps only the text of the error."""
    text = (
        f"Traceback\n{line}\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "ray.exceptions.UserCodeException: "
    )
    made = ray.exceptions.UserCodeException("UDF failed to process a data block.")
    return ray.exceptions.RayTaskError("map", text + str(made), made).as_instanceof_cause()


def actor_died(message: str) -> Exception:
    context = ActorDiedErrorContext(
        error_message=message, actor_id=bytes(16), class_name="MapWorker(MapBatches(EmbedActor))"
    )
    return ray.exceptions.ActorDiedError(context)


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.OutOfMemoryError(LOW),
        task_error(MemoryError("Unable to allocate 3.2 GiB for an array")),
        actor_error(
            "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 3.2 GiB for an array"
        ),
        actor_error("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        task_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        actor_died(
            f"The actor died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: {LOW}"
        ),
        actor_died(LOW),
        WorkerGroupError("1 worker failed", {1: ray.exceptions.OutOfMemoryError(LOW)}),
        WorkerGroupError("1 worker failed", {0: actor_died(LOW)}),
    ],
)
def test_memory_is_told_as_the_reason(error: Exception) -> None:
    found = as_raypipe_error(error)
    assert type(found) is MemoryShortageError and str(found).startswith(
        "workers ran out of memory ("
    )
    wrapped = RuntimeError("of Ray Data")
    wrapped.__cause__ = error
    assert type(as_raypipe_error(wrapped)) is MemoryShortageError


@pytest.mark.parametrize(
    "error",
    [
        actor_died(POSSIBLY),
        ray.exceptions.WorkerCrashedError(),
        task_error(ValueError("a table that is running low on memory")),
        ray.exceptions.NodeDiedError("the node is gone"),
    ],
)
def test_what_may_have_been_memory_is_not_told_as_it(error: Exception) -> None:
    assert type(as_raypipe_error(error)) is StageError


def test_errors_of_storage_and_lease_stay_what_they_are() -> None:
    full = StorageError(
        "s3://bucket/run: the disk is full. Free space there, then run the same command again"
    )
    for error in (full, TakenOverError("taken over")):
        of_actor = actor_error(f"raypipe.errors.{type(error).__name__}: {error}")
        for met in (
            task_error(error),
            of_actor,
            WorkerGroupError("1 worker failed", {0: task_error(error)}),
        ):
            found = as_raypipe_error(met)
            assert type(found) is type(error) and str(found) == str(error)
    assert str(as_raypipe_error(actor_error("KeyError: 'label'"))) == "KeyError: 'label'"


@pytest.mark.parametrize("stage", ["seed", "proxy", "measure", "embed", "extrapolate", "index"])
def test_the_error_of_a_run_names_stage_and_setting(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hungry(Stage):
        name = "index"

        def settings(self, config: Config) -> dict[str, Any]:
            return {}

        def complete(self, context: Context, record: StageRecord) -> bool:
            return False

        def execute(self, context: Context, record: StageRecord) -> None:
            raise as_raypipe_error(ray.exceptions.OutOfMemoryError(LOW))

    Hungry.name = stage
    monkeypatch.setattr(pipeline, "make_stage", lambda name: Hungry())
    config = small_config(str(tmp_path / "run"))
    with pytest.raises(
        MemoryShortageError, match=rf"^{stage}: workers ran out of memory .*rerun to resume$"
    ) as raised:
        pipeline.execute(config, until="index", progress=QUIET)
    for word in pipeline.LESS_MEMORY.get(stage, "").split():
        section, _, field = word.strip(",(").partition(".")
        if field:
            assert hasattr(getattr(config, section), field), f"{word} is no setting"
            assert word.strip(",") in str(raised.value)
    assert (stage in pipeline.LESS_MEMORY) == ("Lower" in str(raised.value))
