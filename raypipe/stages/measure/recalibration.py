"""Recalibrate the BatchNorm statistics of the proxy's checkpoints on the seed set."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from raypipe import storage
from raypipe.config.measure import RECALIBRATED
from raypipe.distributed.cluster import ActorPool
from raypipe.distributed.nodes import run_on_share
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.unit_result import UnitResult
from raypipe.stages.measure.gradient_job import GradientJob, attacked

BATCH_SIZE = 256
"""Images whose statistics are computed together; the result depends on it."""


def recalibrate_checkpoints(job: GradientJob, pool: ActorPool) -> float:
    """Write every checkpoint with BatchNorm statistics of the whole part, where it is missing.

    Returns
    -------
    float
        Processor seconds.
    """
    present = storage.names(job.run.path(job.folders.calibrated))
    seconds: list[float] = []
    run_on_share(
        [file for file in job.part.trained.files if file not in present],
        functools.partial(recalibrate_checkpoint, job),
        lambda result: seconds.append(result.cpu_seconds),
        pool.num_cpus,
        pool.num_gpus,
    )
    return sum(seconds)


def recalibrate_checkpoint(job: GradientJob, file: str) -> UnitResult:
    """Recalibrate one checkpoint. Runs in a task."""
    from safetensors.torch import save
    from torch import Tensor

    from raypipe.scores.calibration import recalibrate
    from raypipe.vision.devices import set_threads, to_device

    watch, run, device = Stopwatch(), job.run, job.device
    set_threads(job.worker.threads)
    adversary = job.config.proxy.adversary
    model = load_checkpoint(run, file, device, folder=job.part.checkpoints)
    # as in training: adversarial examples against the network as it is in the checkpoint
    target_of_attack = (
        load_checkpoint(run, file, device, folder=job.part.checkpoints)
        if adversary is not None
        else None
    )

    def inputs() -> Iterator[Tensor]:
        for images, labels in recalibration_batches(job):
            pixels = to_device(images.copy(), device)
            if adversary is not None:
                target = to_device(labels, device)
                pixels = attacked(target_of_attack, pixels, target, adversary)
            yield pixels

    recalibrate(model, inputs())
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    storage.write_bytes(run.path(job.folders.calibrated, file), save(weights))
    return UnitResult(file, cpu_seconds=watch.lap())


def recalibration_batches(job: GradientJob) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images and labels in batches of `BATCH_SIZE`; the last one may be smaller.

    Of a large part, every k-th sample is used. They are taken from all shards, since the source may
    be sorted by class.
    """
    step = max(1, job.part.samples // RECALIBRATED)
    seen = 0
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    for shard in [*SeedManifest.read(job.run).shards, None]:
        if shard is not None:
            _, images, labels = job.part.read(job.run, shard)
            pending.append((images[-seen % step :: step], labels[-seen % step :: step]))
            seen += len(images)
        images, labels = (np.concatenate(arrays) for arrays in zip(*pending, strict=True))
        # all that is left after the last shard, else whole batches only
        stop = len(images) if shard is None else len(images) // BATCH_SIZE * BATCH_SIZE
        for start in range(0, stop, BATCH_SIZE):
            rows = slice(start, min(stop, start + BATCH_SIZE))
            yield images[rows], labels[rows]
        pending = [(images[stop:], labels[stop:])]
