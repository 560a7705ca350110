"""Proxy: train the small network on the seed set with Ray Train, data-parallel over its workers.

Writes, under `proxy/`:

- `epochs/epoch-0007.json`: loss, accuracy, learning rate and files of the trajectory. An epoch with
  this file is finished.
- `trajectory/epoch-0007-*.parquet`: row (of the seed set); float32 loss, margin, distance and
  entropy, as in `raypipe.scores.trajectory.Trajectory`; probabilities, the bytes of little-endian
  float16 [classes].
- `checkpoints/epoch-0007.safetensors`.
- `state.safetensors`: everything needed to resume after the last finished epoch.
- `resume/`: everything needed to resume within an epoch, written every 25 s of it and when a node
  will be taken away (`raypipe.stages.proxy.resume`).
- `proxy.json`: what the later stages need; written last.

With `proxy.parts` above 1, such networks are trained for each part of the seed set
(`raypipe.runs.partition`), on its part alone; with `proxy.repeats` above 1, several of them for
each part. All start from other weights. Each has the first five items in its own folder, such as
`proxy/part-0/` or `proxy/part-0-repeat-1/`; `proxy.json` describes all of them. They train side by
side as far as the cluster has room.

When a worker or the driver dies, the training resumes from the last saved state. Batches and
the statistics of BatchNorm are defined over the whole seed set (or part): the number of workers
changes the rounding of sums and nothing else.
"""

from __future__ import annotations

import functools
import queue
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import StageError
from raypipe.progress import Meter
from raypipe.proxies.normalisation import input_statistics
from raypipe.runs.initial_weights import identity_of_weights
from raypipe.runs.intermediate import CHECKPOINTS, REMOVED
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
from raypipe.stages.network_check import check_network

if TYPE_CHECKING:
    from raypipe.distributed.cluster import TrainingResources

NOT_OF_THE_RESULT = {
    "workers",
    "use_gpu",
    "cpus_per_worker",
    "max_failures",
    "cross_fit",
    "keep_intermediate",
}
"""Settings that change how fast the training is or what comes after it, but not its result."""
UNSTATED = {
    "channels": 3,
    "repeats": 1,
    "weights": "none",
    "freeze": "none",
    "train": "full",
    "progressive_resizing": False,
}
"""Settings that older runs did not have, with the value that changes nothing."""


@dataclass(frozen=True)
class PartProgress:
    """How far the training of one proxy is.

    Attributes
    ----------
    part : SeedPart
        The proxy's part of the seed set.
    epochs : list of EpochRecord
        Its finished epochs.
    trained : bool
        Whether all epochs are finished and all checkpoints that they name exist.
    """

    part: SeedPart
    epochs: list[EpochRecord]
    trained: bool

    @classmethod
    def read(cls, config: Config, run: Run, part: SeedPart) -> PartProgress:
        """Read the progress of a proxy from the run."""
        epochs = EpochRecord.read_all(run, part.folder)
        checkpoints = {epoch.checkpoint for epoch in epochs if epoch.checkpoint}
        trained = len(epochs) == config.proxy.passes and checkpoints <= storage.names(
            run.path(part.checkpoints)
        )
        return cls(part, epochs, trained)

    def check_epochs(self, expected: int) -> None:
        """Raise StageError unless all epochs are finished."""
        if len(self.epochs) != expected:
            name = f"the proxy of {self.part.name}" if self.part.name else "the proxy"
            raise StageError(
                f"{name} has {len(self.epochs)} finished epochs instead of {expected}; "
                "rerun to resume"
            )


class ProxyStage(Stage):
    """Train all proxies of every part of the seed set."""

    name = "proxy"
    needs = ("seed", "label")

    def settings(self, config: Config) -> dict[str, Any]:
        settings = config.proxy.model_dump(
            mode="json", exclude=NOT_OF_THE_RESULT, exclude_none=True
        )
        for name, value in UNSTATED.items():
            if settings[name] == value:
                del settings[name]
        if "weights" in settings:
            settings["weights"] = identity_of_weights(config.proxy.weights, "proxy")
        return settings

    def check(self, context: Context) -> None:
        check_network(context.config, context.run)

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            parts = proxy_parts(context.run)
        except FileNotFoundError:
            return False
        finals_only = CHECKPOINTS in record.detail.get(REMOVED, [])
        return all(
            {part.trained.final, *(() if finals_only else part.trained.files)}
            <= storage.names(context.run.path(part.checkpoints))
            for part in parts
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        seed = SeedManifest.read(run)
        cluster = context.cluster.for_trainings(config.cluster)
        resources = cluster.training_resources(config.proxy)
        parts = partition_seed_set(run, config.proxy.parts, config.proxy.seed, config.proxy.repeats)
        if too_few := config.proxy.too_few_steps(seed.samples):
            context.progress.say(f"note: {too_few}")
        _check_sizes(parts, resources.workers)
        # with a manifest, the ledger has the seconds of the finished epochs already
        already_counted = storage.exists(run.proxy_manifest_file)
        before = [PartProgress.read(config, run, part) for part in parts]
        train_seconds = _train_missing(context, before, resources)
        after = [
            state if state.trained else PartProgress.read(config, run, state.part)
            for state in before
        ]
        for state in after:
            state.check_epochs(config.proxy.passes)
        _manifest(config, run, seed, after).write(run)
        for part in parts:
            for left in (part.state, part.resume):
                storage.delete(run.path(left))
        record.samples = seed.samples
        record.cpu_seconds += sum(
            epoch.cpu_seconds
            for old, new in zip(before, after, strict=True)
            if not (old.trained and already_counted)
            for epoch in new.epochs
        )
        record.gpu_seconds += train_seconds * resources.workers if resources.gpu else 0.0
        record.detail = _detail(after, config.proxy.passes, resources)


def _check_sizes(parts: Sequence[SeedPart], workers: int) -> None:
    """Raise StageError when a part has fewer than two samples for each worker."""
    smallest = min(part.samples for part in parts)
    if smallest < 2 * workers:
        raise StageError(
            f"{smallest} seed samples are too few for {workers} workers; "
            "lower proxy.workers or raise seed.fraction"
        )


def _train_missing(
    context: Context, parts: Sequence[PartProgress], resources: TrainingResources
) -> float:
    """Train the proxies that are not trained. Returns the seconds of all trainings together."""
    config, run = context.config, context.run
    key = uuid.uuid4().hex
    seconds = [0.0]

    def train(part: SeedPart) -> None:
        started = time.monotonic()
        try:
            _train(config, run, part, key, resources)
        except Exception as error:
            if part.name:  # the error is raised only when the other trainings have ended
                context.progress.say(f"proxy {part.name} stopped: {error}")
            raise
        finally:
            seconds.append(time.monotonic() - started)

    total = len(parts) * config.proxy.passes
    with context.progress.meter("proxy", total, "epochs") as meter:
        meter.already(sum(len(state.epochs) for state in parts))
        watch = _EpochWatch([run.path(state.part.folder, "epochs") for state in parts], meter)
        try:
            jobs = [functools.partial(train, state.part) for state in parts if not state.trained]
            side_by_side(jobs, resources.side_by_side)
        finally:
            watch.stop()
    return sum(seconds)


def _manifest(
    config: Config, run: Run, seed: SeedManifest, parts: Sequence[PartProgress]
) -> ProxyManifest:
    """Describe the finished trainings."""
    mean, std = input_statistics(config.proxy, seed.mean, seed.std)
    return ProxyManifest(
        model=config.proxy.model,
        classes=len(run.classes().names),
        image_size=seed.image_size,
        mean=tuple(mean),
        std=tuple(std),
        samples=seed.samples,
        seed=config.proxy.seed,
        parts=tuple(
            ProxyOfPart(
                state.part.samples,
                state.part.shard_samples,
                TrainedProxy.from_epochs(state.epochs),
            )
            for state in parts
        ),
        repeats=config.proxy.repeats,
        freeze=config.proxy.freeze,
        train=config.proxy.train,
    )


def _detail(
    parts: Sequence[PartProgress], epochs: int, resources: TrainingResources
) -> dict[str, Any]:
    """Return the stage's entry in the ledger: figures of the last epoch, averaged over proxies."""
    last = [state.epochs[-1] for state in parts]
    detail: dict[str, Any] = {
        "accuracy": statistics.fmean(epoch.accuracy for epoch in last),
        "loss": statistics.fmean(epoch.loss for epoch in last),
        "epochs": epochs,
        "workers": resources.workers,
        "gpu": resources.gpu,
    }
    if len(parts) > 1:
        detail["parts"] = [
            {"samples": state.part.samples, "accuracy": epoch.accuracy, "loss": epoch.loss}
            for state, epoch in zip(parts, last, strict=True)
        ]
    return detail


class _EpochWatch:
    """Counts finished epochs, one file each, while Ray Train blocks the driver."""

    def __init__(self, folders: Sequence[str], meter: Meter) -> None:
        self._folders, self._meter, self._stopped = folders, meter, threading.Event()
        self._pause = 0.5 if storage.is_local(folders[0]) else 5.0
        self._thread = threading.Thread(target=self._poll, daemon=True, name="raypipe-epochs")
        self._thread.start()

    def _poll(self) -> None:
        while not self._stopped.wait(self._pause):
            try:
                count = sum(len(storage.names(folder)) for folder in self._folders)
                self._meter.add(max(0, count - self._meter.count))
            except OSError:
                continue  # delays the display only; the workers report real failures

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)


def side_by_side(jobs: Sequence[Callable[[], None]], at_once: int) -> None:
    """Run jobs, at most `at_once` of them at a time, and raise the first error.

    After a failure no job is started. Running jobs finish first, since Ray Train cannot stop them
    and their epochs are kept. With `at_once` 1, jobs run in this thread, where Ray Train notices an
    interrupt.
    """
    if at_once == 1:
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
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _train(
    config: Config, run: Run, part: SeedPart, key: str, resources: TrainingResources
) -> None:
    """Train one proxy. Raises StageError when the training fails or diverges."""
    from raypipe.distributed.ray_train import train
    from raypipe.distributed.spot import training_labels
    from raypipe.distributed.training import Training
    from raypipe.stages.proxy.entry import train_worker
    from raypipe.stages.proxy.training_job import DIVERGED, TrainingJob

    diverged = run.path(part.folder, DIVERGED)
    storage.delete(diverged)
    job = TrainingJob(config.proxy, run.uri, part, resources.gpu, resources.cpus, key)
    training = Training(
        train_worker,
        job.as_arguments(),
        resources.workers,
        resources.gpu,
        resources.cpus,
        run.path(part.folder, "train"),
        training_labels(config.cluster),
    )
    train(training, config.proxy.max_failures)
    if storage.exists(diverged):
        raise StageError(storage.read_json(diverged)["reason"])
