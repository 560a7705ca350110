"""Train a proxy in one worker; Ray Train calls `train_worker` when torch.distributed is ready.

`raypipe.stages.proxy.stage` starts it and describes the files.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from ray.train.torch import get_device, prepare_model
from safetensors.torch import load, save
from torch import Tensor

from raypipe import storage
from raypipe.config import ProxySettings
from raypipe.config.choices import is_own
from raypipe.proxies.networks import new_proxy
from raypipe.proxies.normalisation import input_statistics
from raypipe.runs.initial_weights import read_weights
from raypipe.runs.manifests import EpochRecord, SeedManifest
from raypipe.runs.partition import SeedPart
from raypipe.runs.run import Run
from raypipe.scores.trajectory import STATISTICS
from raypipe.stages.proxy.local_seed import LocalSeedSet, SeedArrays
from raypipe.vision import training
from raypipe.vision.adversarial import attack, starting_points
from raypipe.vision.devices import set_threads, to_device
from raypipe.vision.output_statistics import output_statistics
from raypipe.vision.own_code import augmentation_of
from raypipe.vision.sync_batchnorm import synchronize_batchnorm

DIVERGED = "diverged.json"
"""File with the reason why a training ended before its last epoch."""
GROUP_BYTES = 64 << 20
"""Uncompressed size of one row group of all trajectory files together.

The measure stage holds one row group of each file at a time.
"""


@dataclass(frozen=True)
class TrainingJob:
    """The training of one proxy, as its workers need to know it.

    Attributes
    ----------
    settings : ProxySettings
        The section `proxy` of the configuration.
    run_uri : str
        The run folder.
    part : SeedPart
        The part of the seed set to train on.
    gpu : bool
        Whether each worker has a GPU.
    threads : int
        Torch threads of a worker without a GPU.
    key : str
        Names this attempt of the stage; local copies of the seed set carry it.
    """

    settings: ProxySettings
    run_uri: str
    part: SeedPart
    gpu: bool
    threads: int
    key: str

    def as_arguments(self) -> dict[str, Any]:
        """Return the job as JSON values, which Ray Train passes to every worker."""
        settings = self.settings.model_dump(mode="json")
        return {**vars(self), "settings": settings, "part": dataclasses.asdict(self.part)}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> TrainingJob:
        """Restore the job from `as_arguments`."""
        settings = ProxySettings.model_validate(arguments["settings"])
        return cls(**{**arguments, "settings": settings, "part": SeedPart(**arguments["part"])})


def train_worker(arguments: dict[str, Any]) -> None:
    """Train the proxy from the last finished epoch on, as one worker of several."""
    job = TrainingJob.from_arguments(arguments)
    context = ray.train.get_context()
    if not job.gpu:
        set_threads(job.threads)
    run = Run(job.run_uri)
    seed = SeedManifest.read(run)
    local_seed = LocalSeedSet(run, seed, job.part, job.key)
    first_on_node = context.get_local_rank() == 0
    if first_on_node:
        local_seed.fill()
    distributed.barrier()
    worker = ProxyTraining(
        job, run, seed, local_seed.open(), context.get_world_rank(), context.get_world_size()
    )
    for epoch in range(worker.first_epoch, job.settings.passes):
        if not worker.run_epoch(epoch):
            break
    distributed.barrier()
    if first_on_node:
        local_seed.remove()


@dataclass(frozen=True)
class BatchPredictions:
    """Predictions of n samples in one epoch, as the trajectory stores them.

    Attributes
    ----------
    rows : np.ndarray
        Rows of the samples in the whole seed set, int64 [n].
    statistics : np.ndarray
        The values named by `raypipe.scores.trajectory.STATISTICS`, float32 [n, 4].
    probabilities : np.ndarray
        Class probabilities, float16 [n, classes].
    """

    rows: np.ndarray
    statistics: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class TrainedEpoch:
    """What a worker knows after the steps of one epoch.

    Attributes
    ----------
    lr : float
        Learning rate of the last step.
    sums : Tensor
        Loss and number of correct predictions, summed over this worker's samples, float32 [2].
    predictions : list of BatchPredictions
        Those of the training batches; empty unless `proxy.trajectory` is `train`.
    """

    lr: float
    sums: Tensor
    predictions: list[BatchPredictions]


class ProxyTraining:
    """The network, optimiser and data of one worker.

    Batches are defined over all samples of the part. Worker r of w takes every w-th sample of each
    batch, from sample r on, so that the batches do not depend on the number of workers.

    Attributes
    ----------
    first_epoch : int
        The epoch to begin with: 0, or the one after the last finished epoch.
    """

    def __init__(
        self,
        job: TrainingJob,
        run: Run,
        seed: SeedManifest,
        data: SeedArrays,
        rank: int,
        workers: int,
    ) -> None:
        self._job, self._run, self._data = job, run, data
        # epochs drawn at random are the same for all proxies
        self._scored_epochs = job.settings.checkpoint_epochs()
        self._settings = job.settings.model_copy(update={"seed": job.part.training_seed})
        self._augmentation = augmentation_of(self._settings)
        self._folder = job.part.folder
        self._rank, self._workers = rank, workers
        self._classes = len(run.classes().names)
        self._steps_per_epoch = training.steps_per_epoch(
            len(data.labels), self._settings.batch_size
        )
        self._device = get_device() if job.gpu else torch.device("cpu")

        # weights of their own for each proxy: trainings that are compared must not start alike
        torch.manual_seed(self._settings.seed + job.part.number)
        statistics = input_statistics(self._settings, seed.mean, seed.std)
        network = new_proxy(
            self._settings,
            self._classes,
            seed.image_size,
            statistics,
            read_weights(self._settings),
        ).to(memory_format=torch.channels_last)
        self._model = prepare_model(synchronize_batchnorm(network, job.gpu), self._device)
        # without the wrapper of data-parallel training
        self._network = self._model.module if hasattr(self._model, "module") else self._model
        self._optimizer = training.make_optimizer(self._settings, self._model)
        self.first_epoch = self._restore()

    def _restore(self) -> int:
        """Restore the state after the last finished epoch. Returns the next epoch."""
        try:
            data = storage.read_bytes(self._state_file)
        except FileNotFoundError:
            return 0
        state = load(data)
        finished = int(state.pop("epoch"))
        training.restore_training(state, self._network, self._optimizer)
        return finished + 1

    @property
    def _state_file(self) -> str:
        return self._run.path(self._folder, "state.safetensors")

    def run_epoch(self, epoch: int) -> bool:
        """Train and write one epoch. Returns False when the training diverged and is over."""
        cpu_started = time.process_time()
        trained = self._train(epoch)
        evaluates = self._settings.trajectory == "eval"
        predicted = self._evaluate() if evaluates else trained.predictions
        distributed.all_reduce(trained.sums)
        loss, accuracy = (trained.sums / len(self._data.labels)).tolist()
        if not np.isfinite(loss):
            self._record_divergence(epoch, loss)
            return False
        if predicted:
            self._write_trajectory(epoch, predicted)
        cpu_seconds = torch.tensor([time.process_time() - cpu_started], device=self._device)
        # when this returns, every worker has written its trajectory
        distributed.all_reduce(cpu_seconds)
        if self._rank == 0:
            checkpoint = self._write_checkpoint(epoch)
            EpochRecord(
                epoch=epoch,
                lr=trained.lr,
                steps=(epoch + 1) * self._steps_per_epoch,
                loss=loss,
                accuracy=accuracy,
                checkpoint=checkpoint,
                scored=epoch in self._scored_epochs,
                trajectory=tuple(
                    self._trajectory_file(epoch, rank)
                    for rank in range(self._workers if predicted else 0)
                ),
                cpu_seconds=cpu_seconds.item(),
            ).write(self._run, self._folder)
            self._write_state(epoch)
        ray.train.report({"epoch": epoch, "loss": loss, "accuracy": accuracy, "lr": trained.lr})
        return True

    def _train(self, epoch: int) -> TrainedEpoch:
        """Take the optimiser steps of one epoch."""
        settings, labels = self._settings, self._data.labels
        self._model.train()
        sums = torch.zeros(2, device=self._device)
        predicted: list[BatchPredictions] = []
        batches = training.epoch_batches(len(labels), settings.batch_size, settings.seed, epoch)
        for step, batch in enumerate(batches):
            lr = self._set_learning_rate(epoch, step)
            rows = batch[self._share]
            pixels, target = self._training_batch(epoch, step, batch)
            with torch.autocast("cuda", torch.bfloat16, enabled=self._job.gpu and settings.amp):
                logits = self._model(pixels).float()
            # DDP averages over the workers. Scaled like this, the result is the mean over the
            # whole batch even when the workers have unequal shares of it.
            loss = F.cross_entropy(
                logits, target, reduction="sum", label_smoothing=settings.label_smoothing
            ) * (self._workers / len(batch))
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            with torch.no_grad():
                sums += torch.stack(
                    [
                        F.cross_entropy(logits, target, reduction="sum"),
                        (logits.argmax(1) == target).sum(),
                    ]
                )
                if settings.trajectory == "train":
                    predicted.append(predictions(self._data.seed_rows[rows], logits, target))
        return TrainedEpoch(lr, sums, predicted)

    @property
    def _share(self) -> slice:
        """Share of a batch that this worker takes."""
        return slice(self._rank, None, self._workers)

    def _set_learning_rate(self, epoch: int, step: int) -> float:
        steps = self._steps_per_epoch
        lr = training.learning_rate(
            self._settings, epoch * steps + step, steps * self._settings.passes
        )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _training_batch(self, epoch: int, step: int, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return this worker's augmented images of a batch, attacked where set, and labels."""
        settings, images = self._settings, self._data.images
        chosen = images[batch]
        if self._augmentation is not None:
            own = batch[self._share]
            hashes = self._data.hashes[own]
            chosen[self._share] = self._augmentation(images[own], hashes, settings.seed, epoch)
        augmented = training.augment(chosen, settings, epoch, step, self._share)
        pixels = to_device(augmented, self._device)
        target = to_device(self._data.labels[batch[self._share]], self._device)
        if settings.adversary is not None:
            # drawn for the whole batch, like the augmentation
            start = starting_points(images[batch].shape, settings.seed, epoch, 1 + step, 1)
            pixels = attack(
                self._network,
                pixels,
                target,
                settings.adversary,
                start[self._share],
                bfloat16=self._job.gpu and settings.amp,
            )
        return pixels, target

    def _evaluate(self) -> list[BatchPredictions]:
        """Predict this worker's samples without augmentation, in eval mode."""
        settings, data = self._settings, self._data
        self._model.eval()
        predicted: list[BatchPredictions] = []
        with torch.no_grad():
            own = np.arange(self._rank, len(data.labels), self._workers)
            for rows in np.array_split(own, max(1, len(own) // settings.batch_size)):
                pixels, target = (
                    to_device(array[rows], self._device) for array in (data.images, data.labels)
                )
                if settings.adversary is not None:
                    pixels = attack(self._network, pixels, target, settings.adversary)
                logits = self._network(pixels).float()
                predicted.append(predictions(data.seed_rows[rows], logits, target))
        return predicted

    def _record_divergence(self, epoch: int, loss: float) -> None:
        """Write why the training is over.

        All workers see the same loss and stop together. An exception would make Ray Train repeat
        the epoch, with the same result.
        """
        if self._rank == 0:
            reason = (
                f"the proxy's loss is {loss} in epoch {epoch + 1} with {self._settings.model}; "
                f"lower proxy.lr (now {self._settings.lr:g})"
                f"{', or fix the network' if is_own(self._settings.model) else ''}"
            )
            storage.write_json(self._run.path(self._folder, DIVERGED), {"reason": reason})

    def _trajectory_file(self, epoch: int, rank: int) -> str:
        return f"epoch-{epoch:04d}-{rank}-of-{self._workers}.parquet"

    def _write_trajectory(self, epoch: int, predicted: Sequence[BatchPredictions]) -> None:
        file = self._trajectory_file(epoch, self._rank)
        writers = self._workers * self._job.part.of
        rows = group_rows(self._classes, self._settings.passes, writers)
        write_trajectory(self._run.path(self._folder, "trajectory", file), predicted, rows)

    def _write_checkpoint(self, epoch: int) -> str:
        """Write the weights if this epoch has a checkpoint. Returns its file name, or ""."""
        if epoch not in {*self._scored_epochs, self._settings.passes - 1}:
            return ""
        file = f"epoch-{epoch:04d}.safetensors"
        weights = {
            name: value.detach().cpu().contiguous()
            for name, value in self._network.state_dict().items()
        }
        storage.write_bytes(self._run.path(self._folder, "checkpoints", file), save(weights))
        return file

    def _write_state(self, epoch: int) -> None:
        """Write everything needed to resume after this epoch."""
        state = training.training_state(self._network, self._optimizer)
        storage.write_bytes(self._state_file, save(state | {"epoch": torch.tensor(epoch)}))


def predictions(rows: np.ndarray, logits: Tensor, target: Tensor) -> BatchPredictions:
    """Return what the trajectory stores of a batch.

    The statistics are computed from the logits, before float16 rounds the probabilities.
    """
    statistics = output_statistics(logits, target)
    return BatchPredictions(
        rows,
        torch.stack([statistics[name] for name in STATISTICS], 1).cpu().numpy(),
        logits.softmax(1).half().cpu().numpy(),
    )


def group_rows(classes: int, epochs: int, workers: int) -> int:
    """Return the number of rows in a row group of a trajectory file."""
    return max(64, GROUP_BYTES // (2 * classes * epochs * workers))


def write_trajectory(uri: str, predicted: Sequence[BatchPredictions], group_size: int) -> None:
    """Write one worker's predictions of one epoch, sorted by row of the seed set.

    Parameters
    ----------
    uri
        The Parquet file.
    predicted
        Predictions of all batches of the epoch.
    group_size
        Rows in a row group.
    """
    rows = np.concatenate([batch.rows for batch in predicted])
    order = np.argsort(rows)
    statistics = np.concatenate([batch.statistics for batch in predicted])[order]
    probabilities = np.concatenate([batch.probabilities for batch in predicted])[order]
    columns: dict[str, Any] = {"row": pa.array(rows[order], pa.int64())}
    columns |= {
        name: pa.array(statistics[:, index], pa.float32()) for index, name in enumerate(STATISTICS)
    }
    # Bytes instead of a list of numbers: Parquet writes and reads a list one number at a time,
    # which is 10 times slower.
    columns["probabilities"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * probabilities.shape[1]), len(rows), [None, pa.py_buffer(probabilities)]
    )
    storage.write_table(uri, pa.table(columns), row_group_size=group_size, dictionary=False)
