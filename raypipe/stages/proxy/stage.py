"""Proxy: the small network trained on the seed set with Ray Train, data-parallel over its workers.

Writes, under `proxy/`:

    epochs/epoch-0007.json            loss, accuracy, learning rate, files of the trajectory: an epoch with this file is finished
    trajectory/epoch-0007-*.parquet   row (of the seed set); float32 loss, margin, distance, entropy, as in scores.base.Trajectory;
                                      probabilities, the bytes of little-endian float16 [classes]
    checkpoints/epoch-0007.safetensors
    state.safetensors                 all that is needed to go on after the last finished epoch
    proxy.json                        what the later stages need; written last

With `proxy.parts` above 1 there is one such network for each part of the seed set (`raypipe.runs.partition`), trained on its part
alone. All start from the same weights. Each has the first four in a folder of its own, `proxy/part-0/`; `proxy.json` is about
all of them. They are trained side by side as far as the cluster has room.

A worker that dies is replaced and the training goes on after the last finished epoch; so it does when the driver dies.
Batches are defined over the whole seed set (or part), and so are the statistics of BatchNorm: the number of workers changes the rounding of
sums and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import StageError
from raypipe.progress import Meter
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import (
    EpochRecord,
    ProxyManifest,
    ProxyOfPart,
    SeedManifest,
    TrainedProxy,
)
from raypipe.runs.partition import SeedPart, partition_seed_set, proxy_parts
from raypipe.runs.run import Run
from raypipe.stages.base import Stage

SPEED_ONLY = {"workers", "use_gpu", "cpus_per_worker", "max_failures"}


class ProxyStage(Stage):
    name = "proxy"
    needs = ("seed", "label")

    def settings(self, config: Config) -> dict[str, Any]:
        return config.proxy.model_dump(mode="json", exclude=SPEED_ONLY, exclude_none=True)

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            parts = proxy_parts(context.run)
        except FileNotFoundError:
            return False
        return all(
            {part.trained.final, *(item.file for item in part.trained.checkpoints)}
            <= storage.names(context.run.path(part.checkpoints))
            for part in parts
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        seed = SeedManifest.read(run)
        resources = context.cluster.training_resources(config.proxy)
        workers = resources.workers
        parts = partition_seed_set(run, config.proxy.parts, config.proxy.seed)
        fewest = min(part.samples for part in parts)
        if fewest < 2 * workers:
            raise StageError(
                f"{fewest} seed samples are too few for {workers} workers; lower proxy.workers or raise seed.fraction"
            )
        counted = storage.exists(
            run.proxy_manifest_file
        )  # then the ledger has the seconds of what is there
        epochs = [EpochRecord.read_all(run, part.folder) for part in parts]
        missing = [
            part
            for part, done in zip(parts, epochs, strict=True)
            if not _is_trained(config, run, part, done)
        ]
        key, seconds = uuid.uuid4().hex, [0.0]

        def train(part: SeedPart) -> None:
            started = time.monotonic()
            try:
                _train(config, run, part, key, workers, resources.gpu, resources.cpus)
            except Exception as error:
                if part.name:  # others may go on for long before the error is raised
                    context.progress.say(f"proxy {part.name} stopped: {error}")
                raise
            finally:
                seconds.append(time.monotonic() - started)

        with context.progress.meter("proxy", len(parts) * config.proxy.epochs, "epochs") as meter:
            meter.already(sum(len(done) for done in epochs))
            watch = _Watch([run.path(part.folder, "epochs") for part in parts], meter)
            try:
                side_by_side(
                    [functools.partial(train, part) for part in missing], resources.side_by_side
                )
            finally:
                watch.stop()
        epochs = [
            EpochRecord.read_all(run, part.folder) if part in missing else done
            for part, done in zip(parts, epochs, strict=True)
        ]
        for part, done in zip(parts, epochs, strict=True):
            if len(done) != config.proxy.epochs:
                name = f"the proxy of {part.name}" if part.name else "the proxy"
                raise StageError(
                    f"{name} has {len(done)} finished epochs instead of {config.proxy.epochs}; run again to resume"
                )
        _manifest(config, run, seed, parts, epochs).write(run)
        for part in parts:
            storage.delete(run.path(part.folder, "state.safetensors"))
        trained_now = [
            done for part, done in zip(parts, epochs, strict=True) if part in missing or not counted
        ]
        record.samples = seed.samples
        record.cpu_seconds += sum(epoch.cpu_seconds for done in trained_now for epoch in done)
        record.gpu_seconds += sum(seconds) * workers if resources.gpu else 0.0
        last = [done[-1] for done in epochs]
        record.detail = {
            "accuracy": statistics.fmean(epoch.accuracy for epoch in last),
            "loss": statistics.fmean(epoch.loss for epoch in last),
            "epochs": config.proxy.epochs,
            "workers": workers,
            "gpu": resources.gpu,
        }
        if len(parts) > 1:
            record.detail["parts"] = [
                {"samples": part.samples, "accuracy": epoch.accuracy, "loss": epoch.loss}
                for part, epoch in zip(parts, last, strict=True)
            ]


def _is_trained(config: Config, run: Run, part: SeedPart, epochs: Sequence[EpochRecord]) -> bool:
    """Whether a part has all its epochs and the checkpoints that they name."""
    checkpoints = {epoch.checkpoint for epoch in epochs if epoch.checkpoint}
    complete = len(epochs) == config.proxy.epochs
    return complete and checkpoints <= storage.names(run.path(part.checkpoints))


def _manifest(
    config: Config,
    run: Run,
    seed: SeedManifest,
    parts: Sequence[SeedPart],
    epochs: Sequence[Sequence[EpochRecord]],
) -> ProxyManifest:
    """Describe the finished trainings."""
    mean, std = config.proxy.statistics(seed.mean, seed.std)
    return ProxyManifest(
        model=config.proxy.model,
        classes=len(run.classes().names),
        image_size=seed.image_size,
        mean=tuple(mean),
        std=tuple(std),
        samples=seed.samples,
        seed=config.proxy.seed,
        parts=tuple(
            ProxyOfPart(part.samples, part.shard_samples, TrainedProxy.from_epochs(done))
            for part, done in zip(parts, epochs, strict=True)
        ),
    )


class _Watch:
    """Shows finished epochs, one file each in some folders, while Ray Train holds the driver."""

    def __init__(self, folders: Sequence[str], meter: Meter) -> None:
        self._folders, self._meter, self._over = folders, meter, threading.Event()
        self._pause = 0.5 if storage.is_local(folders[0]) else 5.0
        self._thread = threading.Thread(target=self._look, daemon=True, name="raypipe-epochs")
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(self._pause):
            try:
                count = sum(len(storage.names(folder)) for folder in self._folders)
                self._meter.add(max(0, count - self._meter.count))
            except OSError:
                continue  # only the display is late; the workers report what matters

    def stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=10)


def side_by_side(jobs: Sequence[Callable[[], None]], most: int) -> None:
    """Run jobs, at most so many at a time; a single one at a time in this thread, where Ray Train hears an interrupt.

    After one has failed no other is begun. Those that run go on to their end, since Ray Train has no way to stop them and what
    they finish is kept; then the first error is raised.
    """
    if most == 1:
        for job in jobs:
            job()
        return
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    errors: list[Exception] = []
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while not errors:
            try:
                waiting.get_nowait()()
            except queue.Empty:
                return
            except Exception as error:
                errors.append(error)

    # daemons, so that an interrupt of the driver ends them
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(most, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _train(
    config: Config, run: Run, part: SeedPart, key: str, workers: int, gpu: bool, cpus: int
) -> None:
    from raypipe.distributed import ray_train
    from raypipe.stages.proxy.worker import DIVERGED, train_worker

    diverged = run.path(part.folder, DIVERGED)
    storage.delete(diverged)
    arguments = {
        "config": config.model_dump(mode="json"),
        "run": run.uri,
        "part": dataclasses.asdict(part),
        "gpu": gpu,
        "threads": cpus,
        "key": key,
    }
    ray_train.train(
        train_worker,
        arguments,
        workers,
        gpu,
        cpus,
        config.proxy.max_failures,
        run.path(part.folder, "train"),
    )
    if storage.exists(diverged):
        raise StageError(storage.read_json(diverged)["reason"])
