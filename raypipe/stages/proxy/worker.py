"""Train a proxy in one worker.

`raypipe.stages.proxy.stage` describes the files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import ray.train
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from ray.train.torch import get_device, prepare_model
from safetensors.torch import load, save
from torch import Tensor

from raypipe import storage
from raypipe.config.choices import is_own
from raypipe.distributed.preemption import DrainWatch
from raypipe.proxies.networks import new_proxy
from raypipe.proxies.normalisation import input_statistics
from raypipe.runs.initial_weights import read_weights
from raypipe.runs.manifests import EpochRecord, SeedManifest
from raypipe.runs.run import Run
from raypipe.stages.proxy.local_seed import LocalSeedSet, SeedArrays
from raypipe.stages.proxy.predictions import (
    BatchPredictions,
    group_rows,
    predictions,
    write_trajectory,
)
from raypipe.stages.proxy.resume import EpochProgress, ResumeFolder
from raypipe.stages.proxy.save_clock import Pause, SaveClock
from raypipe.stages.proxy.training_job import DIVERGED, TrainingJob
from raypipe.vision import training
from raypipe.vision.adversarial import attack, starting_points
from raypipe.vision.devices import set_threads, to_device
from raypipe.vision.own_code import augmentation_of
from raypipe.vision.sync_batchnorm import synchronize_batchnorm


def train(job: TrainingJob) -> bool:
    """Train the proxy from its last saved state on, as one worker of several.

    Returns
    -------
    bool
        Whether the training has to continue on other nodes, because one of its own will be taken
        away. Its state is saved.
    """
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
    moves = False
    with DrainWatch() as drain:
        worker = ProxyTraining(
            job,
            run,
            seed,
            local_seed.open(),
            context.get_world_rank(),
            context.get_world_size(),
            drain,
        )
        try:
            for epoch in range(worker.first_epoch, job.settings.passes):
                if not worker.run_epoch(epoch):
                    break
        except _MovesError:
            moves = True
    distributed.barrier()
    if first_on_node:
        local_seed.remove()
    return moves


class _MovesError(Exception):
    """A node will be taken away; the state is saved."""


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
        drain: DrainWatch,
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
        self._resume = ResumeFolder(run.path(job.part.resume), rank, workers)
        self._clock = SaveClock(rank, self._device, drain)
        self._resumed: EpochProgress | None = None
        self.first_epoch = self._restore()

    def _restore(self) -> int:
        """Restore the last saved state. Returns the epoch to begin or to continue with."""
        try:
            state: dict[str, Tensor] | None = load(storage.read_bytes(self._state_file))
        except FileNotFoundError:
            state = None
        epoch = 0 if state is None else int(state.pop("epoch")) + 1
        # worker 0 chooses, because the others could see another state of the folder
        chosen = torch.tensor(
            [epoch, self._resume.latest(epoch) if self._rank == 0 else 0], device=self._device
        )
        distributed.broadcast(chosen, 0)
        epoch, rounds = chosen.tolist()
        if rounds:
            state, self._resumed = self._resume.read(epoch, rounds)
            self._resumed.sums = self._resumed.sums.to(self._device)
        if state is not None:
            training.restore_training(state, self._network, self._optimizer)
        return epoch

    @property
    def _state_file(self) -> str:
        return self._run.path(self._job.part.state)

    def run_epoch(self, epoch: int) -> bool:
        """Train and write one epoch. Returns False when the training diverged and is over."""
        progress, self._resumed = self._resumed or self._begin(epoch), None
        self._cpu_started = time.process_time() - progress.cpu_seconds
        self._train(progress)
        if self._settings.trajectory == "eval":
            self._evaluate(progress)
        distributed.all_reduce(progress.sums)
        loss, accuracy = (progress.sums / len(self._data.labels)).tolist()
        predicted, lr = progress.predictions, self._learning_rate(epoch, self._steps_per_epoch - 1)
        if not np.isfinite(loss):
            self._record_divergence(epoch, loss)
            return False
        if predicted:
            self._write_trajectory(epoch, predicted)
        cpu_seconds = torch.tensor([time.process_time() - self._cpu_started], device=self._device)
        # when this returns, every worker has written its trajectory
        distributed.all_reduce(cpu_seconds)
        if self._rank == 0:
            checkpoint = self._write_checkpoint(epoch)
            EpochRecord(
                epoch=epoch,
                lr=lr,
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
        self._resume.clear()
        self._clock.saved()
        ray.train.report({"epoch": epoch, "loss": loss, "accuracy": accuracy, "lr": lr})
        return True

    def _begin(self, epoch: int) -> EpochProgress:
        """Return the progress at the start of an epoch, whose random numbers are its own."""
        seed = [self._settings.seed, self._job.part.number, epoch, self._rank]
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))  # for dropout
        return EpochProgress(epoch, torch.zeros(2, device=self._device))

    def _train(self, progress: EpochProgress) -> None:
        """Take the remaining optimiser steps of an epoch."""
        settings, labels, epoch = self._settings, self._data.labels, progress.epoch
        self._model.train()
        batches = training.epoch_batches(len(labels), settings.batch_size, settings.seed, epoch)
        for step in range(progress.rounds, len(batches)):
            batch = batches[step]
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate(epoch, step)
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
                progress.sums += torch.stack(
                    [
                        F.cross_entropy(logits, target, reduction="sum"),
                        (logits.argmax(1) == target).sum(),
                    ]
                )
                if settings.trajectory == "train":
                    progress.predictions.append(
                        predictions(self._data.seed_rows[rows], logits, target)
                    )
            self._after_round(progress)

    @property
    def _share(self) -> slice:
        """Share of a batch that this worker takes."""
        return slice(self._rank, None, self._workers)

    def _learning_rate(self, epoch: int, step: int) -> float:
        steps = self._steps_per_epoch
        return training.learning_rate(
            self._settings, epoch * steps + step, steps * self._settings.passes
        )

    def _training_batch(self, epoch: int, step: int, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return this worker's augmented images of a batch, attacked where set, and labels."""
        settings, images = self._settings, self._data.images
        chosen = images[batch]
        if self._augmentation is not None:
            own, hashes = chosen[self._share], self._data.hashes[batch[self._share]]
            chosen[self._share] = self._augmentation(own, hashes, settings.seed, epoch)
        augmented = training.augment(chosen, settings, epoch, step, self._share)
        pixels = training.shrink(to_device(augmented, self._device), settings.size_in_epoch(epoch))
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

    def _evaluate(self, progress: EpochProgress) -> None:
        """Predict this worker's remaining samples without augmentation, in eval mode."""
        settings, data = self._settings, self._data
        self._model.eval()
        own = np.arange(self._rank, len(data.labels), self._workers)
        batches = np.array_split(own, self._batches_of(len(own)))
        with torch.no_grad():
            for batch in range(progress.rounds - self._steps_per_epoch, self._eval_rounds):
                if batch < len(batches):
                    rows = batches[batch]
                    pixels, target = (
                        to_device(array[rows], self._device) for array in (data.images, data.labels)
                    )
                    if settings.adversary is not None:
                        pixels = attack(self._network, pixels, target, settings.adversary)
                    logits = self._network(pixels).float()
                    progress.predictions.append(predictions(data.seed_rows[rows], logits, target))
                self._after_round(progress)

    def _batches_of(self, samples: int) -> int:
        """Return the number of batches in which a worker evaluates its samples."""
        return max(1, samples // self._settings.batch_size)

    @property
    def _eval_rounds(self) -> int:
        """Batches of the worker with the most samples; others can have one less."""
        if self._settings.trajectory != "eval":
            return 0
        return self._batches_of(-(-len(self._data.labels) // self._workers))

    def _after_round(self, progress: EpochProgress) -> None:
        """Count a batch, and save where it is time to. Raises _MovesError if the node goes."""
        progress.rounds += 1
        if progress.rounds == self._steps_per_epoch + self._eval_rounds:
            return  # the state after the epoch is saved next
        pause = self._clock.after_round()
        if pause is Pause.NONE:
            return
        progress.cpu_seconds = time.process_time() - self._cpu_started
        self._resume.save(progress, self._state)
        self._clock.saved()
        if pause is Pause.MOVE:
            raise _MovesError

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
        state = self._state() | {"epoch": torch.tensor(epoch)}
        storage.write_bytes(self._state_file, save(state))

    def _state(self) -> dict[str, Tensor]:
        return training.training_state(self._network, self._optimizer)
