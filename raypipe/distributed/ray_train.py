"""Train with Ray Train: on several workers, or in its local mode in a task for a single worker."""

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
    """A trainer that an interrupt stops.

    On the first interrupt, Ray Train asks its controller to stop, and a controller that waits for
    workers never receives that. Its signal handler also stays installed after the training, and
    then ends the process with exit code 0. Here, an interrupt raises KeyboardInterrupt as usual and
    kills the controller with its workers. Files of finished epochs are kept. See also
    `WorkerStartGuard`.
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
    """Run a training function.

    Parameters
    ----------
    worker : callable
        The training function; every worker runs it with the arguments.
    arguments : dict
        Arguments of the function.
    workers, cpus : int
        Number of workers, and CPUs of each.
    gpu : bool
        Whether each worker has a GPU.
    max_failures : int
        How often workers that die are replaced.
    scratch : str
        URI of a folder for Ray Train's own files; it is deleted afterwards.

    Raises
    ------
    StageError
        If the training fails.
    MemoryShortageError
        If it fails because memory is short.
    """
    try:
        with requesting(resource_shape(cpus, int(gpu))):
            if workers == 1:
                _train_single_worker(worker, arguments, gpu, cpus, max_failures)
            else:
                _train_workers(worker, arguments, workers, gpu, cpus, max_failures, scratch)
    except Exception as error:
        failure = as_raypipe_error(error)
        if isinstance(error, ActorDiedError) and not isinstance(failure, MemoryShortageError):
            # Ray Train replaces workers but not its controller, and the resources of the workers
            # stay taken until this driver ends
            failure = StageError(
                "the controller process of Ray Train died; rerun to resume the training"
            )
        raise failure from error


def _train_workers(
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


def _train_single_worker(
    worker: TrainWorker, arguments: dict[str, Any], gpu: bool, cpus: int, max_failures: int
) -> None:
    """Train in one task.

    The five processes that manage several workers take as long to start as a small training takes.
    """
    # Ray's own retries have no limit for a worker that runs out of memory
    task = ray.remote(num_cpus=cpus, num_gpus=int(gpu), max_retries=0)(fenced(_train_locally))
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
                "the worker of a training died; another resumes after its last finished epoch: %s",
                error,
            )
        except KeyboardInterrupt:
            ray.cancel(training, force=True)
            raise


def _train_locally(worker: TrainWorker, arguments: dict[str, Any]) -> None:
    """Train in Ray Train's local mode, with a process group of a single process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        TorchTrainer(
            worker, train_loop_config=arguments, scaling_config=ScalingConfig(num_workers=0)
        ).fit()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
