"""One training on a keep-list, and its test: arrays in, a model or accuracies out.

Batches, augmentation, schedule and optimiser are those of the proxy (`raypipe.vision.training`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypipe.config import AdversarySettings, ProxySettings
from raypipe.config.choices import is_own
from raypipe.errors import StageError
from raypipe.proxies.networks import ProxyNet, new_proxy
from raypipe.vision import training
from raypipe.vision.adversarial import attack, starting_points
from raypipe.vision.devices import to_device
from raypipe.vision.own_code import augmentation_of

TEST_BATCH = 256
"""Test images in one forward pass."""
State = dict[str, Tensor]
"""State of a training after an epoch: `epoch`, what `training_state` returns, and with `EpochRows`
the steps done and their state."""
STEPS_DONE = "rows.steps"
TRAINING_STATE = ("model.", "optimizer.")
"""Prefixes of what `training_state` returns."""


class EpochRows(Protocol):
    """What a training that takes other samples in every epoch asks for."""

    def choose(self, epoch: int, progress: float) -> tuple[np.ndarray, np.ndarray]:
        """Return rows, int64 [k], and their weights, float32 [k], for an epoch.

        `progress` is the share of the training that is done.
        """

    def record(self, rows: np.ndarray, losses: np.ndarray) -> None:
        """Take note of the losses of some rows, [b] each."""

    def state(self) -> State:
        """Return what `restore` needs to resume."""

    def restore(self, state: State) -> None:
        """Resume from the result of `state`, among other tensors."""


@dataclass(frozen=True)
class TestResult:
    """What a trained model predicts correctly.

    Attributes
    ----------
    accuracy
        Share of the test samples.
    per_class
        Share of each class, float64 [classes]; NaN for a class without test samples.
    correct
        Which test samples, bool [m].
    """

    accuracy: float
    per_class: np.ndarray
    correct: np.ndarray

    @property
    def worst_class(self) -> int:
        """The class with the lowest accuracy."""
        return int(np.nanargmin(self.per_class))


def steps_of(settings: ProxySettings, samples: int) -> int:
    """Return the optimiser steps of a training of `settings.epochs` epochs."""
    return settings.passes * training.steps_per_epoch(samples, settings.batch_size)


def statistics_of(images: np.ndarray, chunk: int = 4096) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of pixels scaled to 0..1.

    `images` is uint8 [n, channels, size, size]; `chunk` images are read at a time.
    """
    channels = images.shape[1]
    total, square = np.zeros(channels), np.zeros(channels)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk].astype(np.float32) / 255
        total += part.sum((0, 2, 3), dtype=np.float64)
        square += np.square(part).sum((0, 2, 3), dtype=np.float64)
    count = max(1, images.size // channels)
    mean = total / count
    return mean.tolist(), np.sqrt(np.maximum(square / count - mean**2, 1e-6)).tolist()


def fit(
    settings: ProxySettings,
    images: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray | EpochRows,
    classes: int,
    statistics: tuple[list[float], list[float]],
    *,
    steps: int | None = None,
    device: str = "cpu",
    bfloat16: bool | None = None,
    keys: np.ndarray | None = None,
    initial: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    save: Callable[[State], None] | None = None,
) -> ProxyNet:
    """Train a new model on some rows of the images.

    Parameters
    ----------
    settings
        Network, epochs, optimiser, augmentation and attack.
    images, labels
        uint8 [n, 3, size, size] and int64 [n].
    rows
        int64 [k], in any order; the training depends on the order. Or what chooses them for each
        epoch, with weights that the losses are multiplied by; `steps` is then required.
    classes
        Number of classes.
    statistics
        Mean and standard deviation of the channels, of pixels from 0 to 1.
    steps
        Optimiser steps; default: those of `settings.epochs` epochs. The learning rate decays over
        exactly these, and the last epoch ends with them.
    device
        Of the training.
    bfloat16
        Mixed precision; default: `settings.amp` on a GPU.
    keys
        A hash of the id of each image, uint64 [n]: `settings.augment` draws from it.
    initial
        State dict that the training starts from; default: weights drawn at random.
    state
        What `save` received at the end of an epoch: the training resumes there, with the same
        result.
    save
        Called with the state at the end of each epoch.

    Raises
    ------
    StageError
        If the loss is not finite, or there is nothing to train on.
    """
    if isinstance(rows, np.ndarray):
        if not len(rows):
            raise StageError("a keep-list without labelled samples cannot be trained on")
        steps = steps_of(settings, len(rows)) if steps is None else steps
    if steps is None:
        raise ValueError("rows that change between epochs need `steps`")
    own_augmentation = augmentation_of(settings)
    if own_augmentation is not None and keys is None:
        raise ValueError("proxy.augment needs `keys`")
    gpu = device != "cpu"
    mixed = (gpu and settings.amp) if bfloat16 is None else bfloat16
    # torch's global generator belongs to the caller
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = new_proxy(settings, classes, settings.image_size, statistics, initial)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, epoch, done = training.make_optimizer(settings, model), 0, 0
    if state is not None:
        epoch = int(state["epoch"]) + 1
        own = {name: value for name, value in state.items() if name.startswith(TRAINING_STATE)}
        training.restore_training(own, model, optimizer)
        if isinstance(rows, np.ndarray):
            done = epoch * training.steps_per_epoch(len(rows), settings.batch_size)
        else:
            done = int(state[STEPS_DONE])
            rows.restore(state)
    while done < steps:
        model.train()
        total = torch.zeros((), device=device)
        if isinstance(rows, np.ndarray):
            current, weights = rows, None
        else:
            current, weights = rows.choose(epoch, done / steps)
        batches = training.epoch_batches(len(current), settings.batch_size, settings.seed, epoch)[
            : steps - done
        ]
        for step, batch in enumerate(batches):
            rate = training.learning_rate(settings, done + step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = current[batch]
            augmented = images[chosen]
            if own_augmentation is not None and keys is not None:
                augmented = own_augmentation(augmented, keys[chosen], settings.seed, epoch)
            pixels = to_device(
                training.augment(augmented, settings, epoch, step, slice(None)), device
            )
            target = to_device(labels[chosen], device)
            if settings.adversary is not None:
                begin = starting_points(pixels.shape, settings.seed, epoch, 1 + step, 1)
                pixels = attack(model, pixels, target, settings.adversary, begin, bfloat16=mixed)
            with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=mixed):
                logits = model(pixels).float()
            smoothing = settings.label_smoothing
            if isinstance(rows, np.ndarray) or weights is None:
                loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
            else:
                losses = F.cross_entropy(
                    logits, target, reduction="none", label_smoothing=smoothing
                )
                rows.record(chosen, losses.detach().cpu().numpy())
                loss = (losses * to_device(weights[batch], device)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        if not np.isfinite(total.item()):
            raise StageError(
                f"the loss is {total.item()} in epoch {epoch + 1} of a training of "
                f"{settings.model} on {len(current):,} samples; lower lr"
                f"{', or fix the network' if is_own(settings.model) else ''}"
            )
        done += len(batches)
        if save is not None:
            progress = {"epoch": torch.tensor(epoch)}
            if not isinstance(rows, np.ndarray):
                progress |= rows.state() | {STEPS_DONE: torch.tensor(done)}
            save(training.training_state(model, optimizer) | progress)
        epoch += 1
    return model


def test(
    model: ProxyNet,
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    device: str = "cpu",
    adversary: AdversarySettings | None = None,
) -> TestResult:
    """Return the accuracy on test images, in eval mode and float32.

    Parameters
    ----------
    model
        On `device`.
    images, labels
        uint8 [m, 3, size, size] and int64 [m].
    classes
        Number of classes.
    adversary
        Test on adversarial examples instead; they start at the same random points in every test.
    """
    right = np.zeros(len(labels), bool)
    with _eval_mode(model), torch.no_grad():
        for start in range(0, len(labels), TEST_BATCH):
            part = slice(start, start + TEST_BATCH)
            pixels = to_device(np.array(images[part]), device)
            if adversary is not None:
                target = to_device(labels[part], device)
                pixels = attack(
                    model, pixels, target, adversary, starting_points(pixels.shape, start)
                )
            predicted = model(pixels).argmax(1).cpu().numpy()
            right[part] = predicted == labels[part]
    correct = np.bincount(labels[right], minlength=classes)
    samples = np.bincount(labels, minlength=classes)
    per_class = np.divide(correct, samples, out=np.full(classes, np.nan), where=samples > 0)
    return TestResult(float(correct.sum() / max(1, len(labels))), per_class, right)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
