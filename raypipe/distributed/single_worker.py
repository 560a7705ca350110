"""Train with a single worker: Ray Train's local mode, in a task.

Only the task imports torch, not the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.train import ScalingConfig

from raypipe.distributed.preemption import DrainWatch
from raypipe.distributed.training import Training, TrainWorker
from raypipe.storage.fences import fenced

log = logging.getLogger("raypipe")


def train_single(training: Training, max_failures: int) -> bool:
    """Train in one task. Returns whether the training has to continue elsewhere.

    The five processes that manage several workers take as long to start as a small training takes.
    """
    task = ray.remote(
        num_cpus=training.cpus,
        num_gpus=int(training.gpu),
        label_selector=training.label_selector,
        max_retries=0,  # Ray's own retries have no limit for a worker that runs out of memory
        num_returns="streaming",
    )(_train_locally)
    while True:
        stream, announced = task.remote(fenced(training.worker), training.arguments), False
        try:
            with DrainWatch(ray.get(next(stream))) as drain:
                try:
                    return bool(ray.get(next(stream)))
                finally:
                    announced = drain.announced
        except (RayTaskError, TaskCancelledError):
            raise
        except RayError as error:
            if not announced:
                if not max_failures:
                    raise
                max_failures -= 1
            log.info(
                "the worker of a training died; another resumes from the last saved state: %s",
                error,
            )
        except KeyboardInterrupt:
            ray.cancel(stream, force=True)
            raise


def _train_locally(worker: TrainWorker, arguments: dict[str, Any]) -> Iterator[str | bool]:
    """Train in Ray Train's local mode, with a process group of a single process.

    Yields the node, and at the end whether the training has to continue on another one.
    """
    import torch.distributed as distributed
    from ray.train.torch import TorchTrainer

    yield ray.get_runtime_context().get_node_id()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        result = TorchTrainer(
            worker, train_loop_config=arguments, scaling_config=ScalingConfig(num_workers=0)
        ).fit()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    yield result.return_value
