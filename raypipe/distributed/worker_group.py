"""Train with several workers of Ray Train."""

from __future__ import annotations

import logging
import uuid
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from raypipe import storage
from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.training import Training
from raypipe.errors import MemoryShortageError, StageError
from raypipe.storage.fences import fenced

log = logging.getLogger("raypipe")


class WorkerStartGuard(WorkerGroupCallback):
    """Clean up after worker groups that fail while they start.

    If a worker dies before all workers train, for example while they connect, Ray Train (2.60)
    starts a new group but leaves the other workers alive. They hold the CPUs and GPUs of the old
    group, and a cluster without as many free ones waits forever. Ray Train also has no limit for
    such failures.

    Parameters
    ----------
    max_failures : int
        Groups in a row that can fail this way; one more raises StageError.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = self._failures_left = max_failures
        self._starting = False
        self._group: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        group, self._group = self._group, None
        if group is not None and group.has_started():
            group.abort()
        if self._starting:
            self._failures_left -= 1
        self._starting = False
        if self._failures_left < 0:
            raise StageError(
                "workers of the training keep dying while they start; see Ray's logs for the reason"
            )

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        self._starting = True
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._starting, self._failures_left = False, self._max_failures


class InterruptibleTrainer(TorchTrainer):
    """A trainer that an interrupt stops, and that leaves nothing behind when it fails.

    On the first interrupt, Ray Train asks its controller to stop, and a controller that waits for
    workers never receives that. Its signal handler also stays installed after the training, and
    then ends the process with exit code 0. Here, an interrupt raises KeyboardInterrupt as usual and
    kills the controller with its workers. Files of finished epochs are kept.

    If a worker fails while it loads the training function, Ray Train (2.60) ends but leaves the
    workers alive as long as the controller. See also `WorkerStartGuard`.
    """

    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        guard = WorkerStartGuard(self.run_config.failure_config.max_failures)
        # first, because callbacks after one that fails are not called
        return [guard, *super()._create_default_callbacks()]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def fit(self) -> Result:
        try:
            return super().fit()
        except BaseException as error:
            if self._controller is not None:
                ray.kill(self._controller)
                if isinstance(error, Exception):  # an interrupt ends the driver
                    _remove_placement_groups(self._controller._actor_id.hex())
            raise


def train_group(training: Training, max_failures: int) -> bool:
    """Train with several workers. Returns whether the training has to continue elsewhere.

    Ray Train (2.60) replaces neither its controller nor a worker that dies while it loads the
    training function. Another trainer resumes the training then.
    """
    while True:
        trainer = _trainer(training, max_failures)
        try:
            return bool(trainer.fit().return_value)
        except (ActorDiedError, ControllerError) as error:
            died = error.controller_failure if isinstance(error, ControllerError) else error
            memory = isinstance(as_raypipe_error(error), MemoryShortageError)
            if memory or not isinstance(died, ActorDiedError):
                raise
            if not max_failures:
                raise StageError(
                    "a process of Ray Train died, the controller or a worker that was starting; "
                    "rerun to resume the training"
                ) from error
            max_failures -= 1
            log.info(
                "a process of Ray Train died, the controller or a worker that was starting; "
                "another trainer resumes the training: %s",
                died,
            )
        finally:
            storage.delete(training.scratch)


def _trainer(training: Training, max_failures: int) -> InterruptibleTrainer:
    fs, path = storage.filesystem(training.scratch)
    gpu, cpus = training.gpu, training.cpus
    resources: dict[str, float] = {"CPU": cpus, **({"GPU": 1} if gpu else {})}
    return InterruptibleTrainer(
        fenced(training.worker),
        train_loop_config=training.arguments,
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=gpu,
            resources_per_worker=resources,
            label_selector=training.label_selector or None,
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=path,
            storage_filesystem=LocalFileSystem()
            if storage.is_local(training.scratch)
            else PyFileSystem(FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )


def _remove_placement_groups(controller: str) -> None:
    """Remove the placement groups of a controller that has ended.

    Ray keeps them as long as the driver lives, and the CPUs and GPUs in them. Ray Train's own
    cleaner needs the dashboard, which not every cluster has.
    """
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for table in state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(table)
        if group.creator_actor_id.hex() == controller:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
