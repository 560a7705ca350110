"""Which trainings an evaluation has, what determines each, and the small file that holds its result. No Ray.

evaluation/<fingerprint>.json         accuracy, accuracy by class, seconds: a training with this file is never made again
evaluation/<fingerprint>.safetensors  of one under way: what it goes on from, at most a minute old after a long epoch
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from raypipe import storage
from raypipe.config import AdversarySettings, Config, ProxySettings
from raypipe.config.evaluate import EvaluateSettings
from raypipe.evaluation.decoded import NodeCopy
from raypipe.evaluation.lists import ListedSamples, SamplePool
from raypipe.evaluation.train import State, fit, steps_of, test
from raypipe.runs.layout import Run
from raypipe.runs.ledger import fingerprint
from raypipe.vision.devices import set_threads

FOLDER = "evaluation"
SAVE_SECONDS = 60.0
"""Least time between two states of a training under way."""
RECIPE = (
    "model", "image_size", "normalize", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "schedule",
    "label_smoothing", "flip", "crop_padding", "amp", "adversary",
)  # fmt: skip
"""Settings of `proxy` that a training on a list goes by; the others are about scores, or about speed."""


@dataclass(frozen=True, eq=False)
class Training:
    """One training: a list, and a seed of weights, order and augmentation. `name` is the fingerprint of all that determines it."""

    name: str
    listed: ListedSamples
    seed: int
    steps: int
    settings: ProxySettings

    def path(self, run: Run, suffix: str = "json") -> str:
        return run.path(FOLDER, f"{self.name}.{suffix}")


def recipe_of(config: Config, settings: EvaluateSettings) -> ProxySettings:
    """How lists are trained on: the run's `proxy`, with what the evaluation changes."""
    given = config.proxy.model_dump()
    changed = {
        name: getattr(settings, name)
        for name in ("model", "image_size", "epochs", "batch_size", "lr")
    }
    given |= {name: value for name, value in changed.items() if value is not None}
    given["adversary"] = (
        (config.proxy.adversary or AdversarySettings()) if settings.attack else None
    )
    kept = {name: given[name] for name in RECIPE}
    return ProxySettings.model_validate({**kept, "checkpoints": 1})


def trainings_of(
    lists: Sequence[ListedSamples],
    pool: SamplePool,
    recipe: ProxySettings,
    settings: EvaluateSettings,
    data: str,
    gpu: bool,
) -> list[Training]:
    """Every list with every seed; those of full set and random lists first, since everything is compared with them.

    data  hash of what samples and test images are; gpu: whether trainings have one, since mixed precision and seconds depend on it
    """
    everything = steps_of(recipe, len(pool))
    result = []
    for listed in sorted(lists, key=lambda listed: listed.strategy != ""):
        for seed in range(settings.seeds) if listed.draw is None else (listed.draw,):
            steps = (
                steps_of(recipe, len(listed.rows)) if settings.protocol == "epochs" else everything
            )
            own = recipe.model_copy(update={"seed": seed})
            stated = own.model_dump(mode="json", include={*RECIPE, "seed"}, exclude_none=True)
            name = fingerprint("evaluation", data, pool.digest, listed.digest, stated, steps, gpu)
            result.append(Training(name, listed, seed, steps, own))
    return result


def train_one(
    run_uri: str, copy: NodeCopy, classes: int, threads: int, gpu: bool, training: Training
) -> dict[str, Any]:
    """Train, test, and write the result. Goes on where an attempt that was killed had got to. Runs in a task."""
    run, device = Run(run_uri), "cuda" if gpu else "cpu"
    set_threads(threads)
    data = copy.open()
    state_file = training.path(run, "safetensors")
    state, spent = _earlier(state_file)
    started, busy, saved = time.monotonic(), time.process_time(), time.monotonic()

    def seconds() -> dict[str, float]:
        wall = time.monotonic() - started
        now = {
            "wall_seconds": wall,
            "cpu_seconds": time.process_time() - busy,
            "gpu_seconds": wall if gpu else 0.0,
        }
        return {name: value + spent.get(name, 0.0) for name, value in now.items()}

    def keep(state: State) -> None:
        nonlocal saved
        if time.monotonic() - saved >= SAVE_SECONDS:
            extra = {
                f"spent.{name}": torch.tensor(value, dtype=torch.float64)
                for name, value in seconds().items()
            }
            storage.write_bytes(state_file, save(state | extra))
            saved = time.monotonic()

    statistics = training.settings.statistics(*data.statistics)
    rows, steps = training.listed.rows, training.steps
    model = fit(
        training.settings,
        data.images,
        data.labels,
        rows,
        classes,
        statistics,
        steps=steps,
        device=device,
        state=state,
        save=keep,
    )
    trained = seconds()
    tested = test(model, data.test_images, data.test_labels, classes, device)
    adversary, robust = training.settings.adversary, {}
    if adversary is not None:
        robust["robust_accuracy"] = test(
            model, data.test_images, data.test_labels, classes, device, adversary
        ).accuracy
    result = {
        "list": training.listed.name,
        "fraction": training.listed.fraction,
        "seed": training.seed,
        "samples": len(rows),
        "steps": steps,
        "accuracy": tested.accuracy,
        **robust,
        "worst_class": tested.worst_class,
        "worst_class_accuracy": float(np.nanmin(tested.per_class)),
        "per_class": [None if np.isnan(value) else float(value) for value in tested.per_class],
        "gpu": gpu,
        **trained,
    }
    storage.write_json(training.path(run), result)
    storage.delete(state_file)
    return {"name": training.name}


def _earlier(uri: str) -> tuple[State | None, dict[str, float]]:
    """The state of an attempt that was killed and the seconds it spent; None and nothing where there was none."""
    try:
        found = load(storage.read_bytes(uri))
    except FileNotFoundError:
        return None, {}
    spent = {
        name.removeprefix("spent."): found.pop(name).item()
        for name in list(found)
        if name.startswith("spent.")
    }
    return found, spent
