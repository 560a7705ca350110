"""The first pass of MoSo: the mean gradient of the seed set at every checkpoint.

Tasks sum the gradients of groups of seed shards. The sums are added in a tree of fixed shape, so
that the result does not depend on the number of workers and the driver sees no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe import storage
from raypipe.distributed.cluster import ActorPool
from raypipe.distributed.tree_sum import tree_sums
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.runs.unit_result import UnitResult
from raypipe.stages.measure.gradient_job import GradientJob, attacked

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.proxies.networks import ProxyNet

MAX_GROUPS = 64
"""Partial sums of a mean gradient: enough for many workers, few enough to add up quickly."""

Gradient = dict[str, np.ndarray]
"""Values by the names of the network's parameters."""


def write_mean_gradients(
    job: GradientJob,
    files: Sequence[str],
    shards: Sequence[str],
    pool: ActorPool,
    on_done: Callable[[int], None],
) -> float:
    """Write the mean gradient at some checkpoints.

    Parameters
    ----------
    job
        The part of the seed set.
    files
        The checkpoints.
    shards
        All seed shards.
    pool
        What share of a machine each task takes.
    on_done
        Called with the number of samples of each finished group.

    Returns
    -------
    float
        Processor seconds.
    """
    groups = np.array_split(np.array(shards), min(MAX_GROUPS, len(shards)))
    seconds: list[float] = []

    def collect(report: UnitResult) -> None:
        seconds.append(report.cpu_seconds)
        on_done(report.samples)

    tree_sums(
        [group.tolist() for group in groups],
        files,
        functools.partial(_sum_gradients, job, files),
        _add,
        functools.partial(_store_mean, job),
        pool,
        collect,
    )
    return sum(seconds)


def _sum_gradients(
    job: GradientJob, files: Sequence[str], shards: Sequence[str]
) -> list[Gradient | UnitResult]:
    """Sum the gradients over some seed shards, one sum per checkpoint. Runs in a task.

    Returns the sums, and after them a report.
    """
    from raypipe.vision.devices import AdaptiveBatch, set_threads, to_device

    watch = Stopwatch()
    set_threads(job.worker.threads)
    size = job.images_at_once
    at_once = AdaptiveBatch(size)
    models = [job.load_checkpoint(file) for file in files]
    totals: list[dict[str, Tensor]] = [{} for _ in files]
    samples = 0
    for shard in shards:
        _, images, labels = job.part.read(job.run, shard)
        for start in range(0, len(labels), size):
            pixels = to_device(images[start : start + size].copy(), job.device)
            target = to_device(labels[start : start + size], job.device)
            for model, total in zip(models, totals, strict=True):
                sum_batch = functools.partial(_sum_batch, job, model)
                for sums in at_once(sum_batch, pixels, target):
                    for name, value in sums.items():
                        total[name] = total[name] + value if name in total else value
        samples += len(labels)
    arrays = [{name: value.cpu().numpy() for name, value in total.items()} for total in totals]
    return [*arrays, UnitResult(samples=samples, cpu_seconds=watch.lap())]


def _sum_batch(
    job: GradientJob, model: ProxyNet, pixels: Tensor, target: Tensor
) -> Mapping[str, Tensor]:
    """Sum the gradients over one batch."""
    from raypipe.scores import head, moso
    from raypipe.vision.precision import use_precision

    measure = job.config.measure
    gradient_sum = head.head_gradient_sum if measure.moso.gradient == "head" else moso.gradient_sum
    with use_precision(measure.precision, job.device):
        images = attacked(model, pixels, target, job.config.proxy.adversary)
        return gradient_sum(model, images, target)


def _add(*sums: Gradient) -> Gradient:
    result = dict(sums[0]) if sums else {}
    for other in sums[1:]:
        for name, value in other.items():
            result[name] = result[name] + value if name in result else value
    return result


def _store_mean(job: GradientJob, file: str, total: Gradient) -> None:
    """Write the mean gradient at one checkpoint. Runs in a task."""
    from safetensors.numpy import save

    samples = np.float32(job.part.samples)
    mean = {name: np.ascontiguousarray(value / samples) for name, value in total.items()}
    if not all(np.isfinite(value).all() for value in mean.values()):
        raise StageError(
            f"the mean gradient at {file} is not finite: the proxy's training diverged; "
            "lower proxy.lr and run again"
        )
    storage.write_bytes(job.run.path(job.folders.gradients, file), save(mean))
