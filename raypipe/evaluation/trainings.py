"""The trainings of an evaluation, what determines each, and the file with its result. No Ray.

- `evaluation/<fingerprint>.json`: accuracy, by class and by test sample, and seconds. A training
  that has this file is never repeated.
- `evaluation/<fingerprint>.safetensors`: the state from which a training in progress resumes; at
  most a minute old at the end of an epoch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from raypipe import storage
from raypipe.config import AdversarySettings, Config, ProxySettings
from raypipe.config.evaluate import EvaluateSettings
from raypipe.distributed.code_identity import augment_code, network_code
from raypipe.evaluation.decoded import NodeCopy
from raypipe.evaluation.lists import ListedSamples, SamplePool
from raypipe.proxies.normalisation import input_statistics
from raypipe.runs.initial_weights import identity_of_weights, read_weights
from raypipe.runs.ledger import fingerprint
from raypipe.runs.packed_bits import pack
from raypipe.runs.run import Run
from raypipe.vision.devices import set_threads
from raypipe.vision.fitting import State, fit, steps_of, test

SAVE_SECONDS = 60.0
"""Shortest time between two states of a training in progress."""
SPENT = "spent."
"""Prefix of the seconds in a state file."""
RECIPE = (
    "model", "image_size", "normalize", "epochs", "batch_size", "optimizer", "lr", "momentum",
    "weight_decay", "schedule", "label_smoothing", "flip", "augment", "crop_padding", "amp",
    "adversary",
)  # fmt: skip
"""Settings of `proxy` that a training on a list uses; the others concern scores or speed."""
OF_THE_NETWORK = {"weights": "none", "freeze": "none", "train": "full"}
"""Further ones that belong to the run's network, with the value that changes nothing: they are not
used for another network, and earlier results are valid without them."""


@dataclass(frozen=True, eq=False)
class Training:
    """One training.

    Attributes
    ----------
    name
        Fingerprint of everything that determines it.
    listed
        The list it is on.
    seed
        Of weights, order and augmentation.
    steps
        Optimiser steps.
    settings
        The recipe, with this seed.
    """

    name: str
    listed: ListedSamples
    seed: int
    steps: int
    settings: ProxySettings

    def path(self, run: Run, suffix: str = "json") -> str:
        """Return the URI of its result, or of its state."""
        return run.evaluation_file(f"{self.name}.{suffix}")


def recipe_of(config: Config, settings: EvaluateSettings, samples: int) -> ProxySettings:
    """Return how lists are trained on: the run's `proxy`, with what the evaluation changes.

    `epochs: auto` becomes the number that suits the full set of `samples`.
    """
    proxy = config.proxy.model_dump()
    changed = {
        name: getattr(settings, name)
        for name in ("model", "image_size", "epochs", "batch_size", "lr")
    }
    proxy |= {name: value for name, value in changed.items() if value is not None}
    proxy["adversary"] = (
        (config.proxy.adversary or AdversarySettings()) if settings.attack else None
    )
    recipe = {name: proxy[name] for name in RECIPE}
    if settings.model in (None, config.proxy.model):
        recipe |= {name: proxy[name] for name in OF_THE_NETWORK}
    return ProxySettings.model_validate({**recipe, "checkpoints": 1, "parts": 1}).for_seed_set(
        samples
    )


def trainings_of(
    lists: Sequence[ListedSamples],
    pool: SamplePool,
    recipe: ProxySettings,
    settings: EvaluateSettings,
    data: str,
    gpu: bool,
) -> list[Training]:
    """Return a training for every list and seed.

    Those of the full set and of random lists come first: everything is compared with them.

    Parameters
    ----------
    lists, pool
        What is trained on.
    recipe, settings
        How.
    data
        Hash of samples and test set.
    gpu
        Whether trainings use a GPU: mixed precision and seconds depend on it.
    """
    everything = steps_of(recipe, len(pool))
    result = []
    for listed in sorted(lists, key=lambda listed: listed.strategy != ""):
        for seed in range(settings.seeds) if listed.draw is None else (listed.draw,):
            steps = (
                steps_of(recipe, listed.samples) if settings.protocol == "epochs" else everything
            )
            own = recipe.model_copy(update={"seed": seed})
            stated = own.model_dump(mode="json", include={*RECIPE, "seed"}, exclude_none=True)
            stated |= {
                name: getattr(own, name)
                for name, value in OF_THE_NETWORK.items()
                if getattr(own, name) != value
            }
            if "weights" in stated:
                stated["weights"] = identity_of_weights(own.weights, "proxy")
            stated |= network_code(own.model)
            stated |= {"augment_code": hash_} if (hash_ := augment_code(own.augment)) else {}
            name = fingerprint("evaluation", data, pool.digest, listed.digest, stated, steps, gpu)
            result.append(Training(name, listed, seed, steps, own))
    return result


class _Clock:
    """Seconds of a training, including those of earlier attempts."""

    def __init__(self, gpu: bool, spent: Mapping[str, float]) -> None:
        self._gpu, self._spent = gpu, spent
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def seconds(self) -> dict[str, float]:
        wall = time.monotonic() - self._wall
        now = {
            "wall_seconds": wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "gpu_seconds": wall if self._gpu else 0.0,
        }
        return {name: value + self._spent.get(name, 0.0) for name, value in now.items()}


class _StateFile:
    """The state of a training in progress, with the seconds spent so far."""

    def __init__(self, uri: str) -> None:
        self._uri, self._saved = uri, time.monotonic()

    def read(self) -> tuple[State | None, dict[str, float]]:
        """Return the state of a killed attempt and its seconds; None and nothing without one."""
        try:
            state = load(storage.read_bytes(self._uri))
        except FileNotFoundError:
            return None, {}
        spent = {
            name.removeprefix(SPENT): state.pop(name).item()
            for name in list(state)
            if name.startswith(SPENT)
        }
        return state, spent

    def write(self, state: State, seconds: Mapping[str, float]) -> None:
        """Write the state, unless the last one is less than SAVE_SECONDS old."""
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return
        spent = {
            f"{SPENT}{name}": torch.tensor(value, dtype=torch.float64)
            for name, value in seconds.items()
        }
        storage.write_bytes(self._uri, save(state | spent))
        self._saved = time.monotonic()

    def delete(self) -> None:
        storage.delete(self._uri)


def train_one(
    run_uri: str, copy: NodeCopy, classes: int, threads: int, gpu: bool, training: Training
) -> dict[str, Any]:
    """Train, test, and write the result; resume an attempt that was killed. Runs in a task."""
    run, device = Run(run_uri), "cuda" if gpu else "cpu"
    set_threads(threads)
    data = copy.open()
    state_file = _StateFile(training.path(run, "safetensors"))
    state, spent = state_file.read()
    clock = _Clock(gpu, spent)
    settings, listed = training.settings, training.listed
    model = fit(
        settings,
        data.images,
        data.labels,
        listed.rows if listed.dynamic is None else listed.dynamic.start(settings.seed),
        classes,
        input_statistics(settings, *data.statistics),
        steps=training.steps,
        device=device,
        keys=data.keys,
        initial=read_weights(settings),
        state=state,
        save=lambda state: state_file.write(state, clock.seconds()),
    )
    seconds = clock.seconds()
    tested = test(model, data.test_images, data.test_labels, classes, device)
    robust: dict[str, float] = {}
    if settings.adversary is not None:
        attacked = test(
            model, data.test_images, data.test_labels, classes, device, settings.adversary
        )
        robust["robust_accuracy"] = attacked.accuracy
    result = {
        "list": listed.name,
        "fraction": listed.fraction,
        "seed": training.seed,
        "samples": listed.samples,
        "steps": training.steps,
        "accuracy": tested.accuracy,
        **robust,
        "worst_class": tested.worst_class,
        "worst_class_accuracy": float(np.nanmin(tested.per_class)),
        "correct": pack(tested.correct),
        "per_class": [None if np.isnan(value) else float(value) for value in tested.per_class],
        "gpu": gpu,
        **seconds,
    }
    storage.write_json(training.path(run), result)
    state_file.delete()
    return {"name": training.name}
