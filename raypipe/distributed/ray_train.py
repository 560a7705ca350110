"""A training with Ray Train: on several workers, or as its local mode in a task where there is one."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

import ray
import torch.distributed as distributed
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
from ray.exceptions import ActorDiedError, RayError, RayTaskError, TaskCancelledError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from raypipe import storage
from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.pending import requesting, resource_shape
from raypipe.errors import MemoryShortageError, StageError
from raypipe.storage.fences import fenced

log = logging.getLogger("raypipe")

TrainWorker = Callable[[dict[str, Any]], None]
"""The training function that every worker runs, given the arguments."""


class WorkerStartGuard(WorkerGroupCallback):
    """Looks after groups of workers that start, which Ray Train (2.60) does not where one of them dies before all train, while they find each
    other, say. It makes a new group, but leaves the others alive and the CPUs and GPUs of the group taken, so that a cluster without as many to
    spare waits for them without end; and it does so however often they die.

    max_failures  how many such groups there may be, one after the other; another raises StageError
    """

    def __init__(self, max_failures: int) -> None:
        self._most = self._left = max_failures
        self._starting = False
        self._group: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        group, self._group = self._group, None
        if group is not None and group.has_started():
            group.abort()
        if self._starting:
            self._left -= 1
        self._starting = False
        if self._left < 0:
            raise StageError(
                "workers of the training die while they start, again and again; Ray's logs may tell why"
            )

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        self._starting = True
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._starting, self._left = False, self._most


class InterruptibleTrainer(TorchTrainer):
    """Ray Train answers the first interrupt by asking its controller to stop, which one that waits for workers never hears, and leaves
    its signal handler in place after the training, where it ends the process with exit code 0. Here the interrupt is an ordinary
    KeyboardInterrupt and the controller is killed, and with it its workers; what the finished epochs wrote is kept. See also `Starts`."""

    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        starts = WorkerStartGuard(self.run_config.failure_config.max_failures)
        return [
            starts,
            *super()._create_default_callbacks(),
        ]  # first, since those behind the one that fails are not called

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def fit(self) -> Result:
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self._controller is not None:
                ray.kill(self._controller)
            raise


def train(
    worker: TrainWorker,
    arguments: dict[str, Any],
    workers: int,
    gpu: bool,
    cpus: int,
    max_failures: int,
    scratch: str,
) -> None:
    """Run a training function on so many workers with so many CPUs each, and a GPU each where `gpu`.

    max_failures  how often workers that die are replaced
    scratch       URI of a folder for Ray Train's own files
    Raises StageError when the training fails, MemoryShortageError where memory was the reason.
    """
    try:
        with requesting(resource_shape(cpus, int(gpu))):
            if workers == 1:
                _alone(worker, arguments, gpu, cpus, max_failures)
            else:
                _together(worker, arguments, workers, gpu, cpus, max_failures, scratch)
    except Exception as error:
        found = as_raypipe_error(error)
        if isinstance(error, ActorDiedError) and not isinstance(found, MemoryShortageError):
            # Ray Train replaces workers, but nobody its controller, and the workers' places stay taken until this driver ends
            found = StageError(
                "the process with which Ray Train looks after the training died; run again to resume"
            )
        raise found from error


def _together(
    worker: TrainWorker,
    arguments: dict[str, Any],
    workers: int,
    gpu: bool,
    cpus: int,
    max_failures: int,
    scratch: str,
) -> None:
    fs, path = storage.filesystem(scratch)
    resources: dict[str, float] = {"CPU": cpus, **({"GPU": 1} if gpu else {})}
    trainer = InterruptibleTrainer(
        fenced(worker),
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=path,
            storage_filesystem=LocalFileSystem()
            if storage.is_local(scratch)
            else PyFileSystem(FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        trainer.fit()
    finally:
        storage.delete(scratch)


def _alone(
    worker: TrainWorker, arguments: dict[str, Any], gpu: bool, cpus: int, max_failures: int
) -> None:
    """One worker needs none of the five processes that look after several, whose start takes as long as many a training."""
    # Ray's own retries have no bound where a worker runs out of memory
    task = ray.remote(num_cpus=cpus, num_gpus=int(gpu), max_retries=0)(fenced(_train_alone))
    while True:
        training = task.remote(worker, arguments)
        try:
            return ray.get(training)
        except (RayTaskError, TaskCancelledError):
            raise
        except RayError as error:
            if not max_failures:
                raise
            max_failures -= 1
            log.info(
                "the worker of a training died; another goes on after its last finished epoch: %s",
                error,
            )
        except KeyboardInterrupt:
            ray.cancel(training, force=True)
            raise


def _train_alone(worker: TrainWorker, arguments: dict[str, Any]) -> None:
    """The training as Ray Train's local mode, in this process, with a group of its own of torch.distributed."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        TorchTrainer(
            worker, train_loop_config=arguments, scaling_config=ScalingConfig(num_workers=0)
        ).fit()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
