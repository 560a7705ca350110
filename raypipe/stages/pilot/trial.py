"""One training of the pilot: cut a list from the seed set, train on it, test on the audit set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.config import PilotSettings, ProxySettings
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.packed_bits import pack
from raypipe.runs.pilot import PilotCell, PilotPlan, PilotTrial
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult
from raypipe.selection import hash64, needs_classes, select
from raypipe.selection.hashing import canonical_hashes
from raypipe.stages.pilot.samples import ListRule, PilotSamples, cached_samples

SUBSET_SEED = 0x70696C6F74
"""Added to the seed of a repeat where a share of the seed set is drawn, so that the draw differs
from those of the lists."""
RECIPE = (
    "normalize", "optimizer", "momentum", "weight_decay", "schedule", "label_smoothing", "flip",
    "augment",
)  # fmt: skip
"""Settings of the proxy that the trainings share with it."""


def recipe_of(
    settings: PilotSettings, proxy: ProxySettings, image_size: int, repeat: int
) -> ProxySettings:
    """Return how a repeat is trained: like the proxy, but for network, pixels and length."""
    shared = {name: getattr(proxy, name) for name in RECIPE}
    own = {name: getattr(settings, name) for name in ("model", "epochs", "batch_size", "lr")}
    return ProxySettings.model_validate(
        {
            **shared,
            **own,
            "image_size": image_size,
            "crop_padding": round(proxy.crop_padding * image_size / proxy.image_size),
            "checkpoints": 1,
            "seed": settings.seed + repeat,
        }
    )


def rows_of_list(
    samples: PilotSamples, rule: ListRule, cell: PilotCell, classes: int, seed: int, repeat: int
) -> np.ndarray:
    """Return the rows of a list, int64, ascending.

    A share of the samples is drawn by a hash of id and repeat, always the same number. The list is
    cut from these as one of the whole source is, with another draw in each repeat.
    """
    rows = np.flatnonzero(~samples.test)
    drawn = hash64(samples.ids, seed + repeat + SUBSET_SEED)[rows]
    count = round(cell.size * len(rows))
    rows = np.sort(rows[np.argsort(drawn, kind="stable")[:count]])
    part = samples.take(rows)
    chunk = part.chunk()
    options = replace(rule.options, seed=rule.options.seed + repeat)
    (cut,) = select(
        lambda _: [chunk],
        [cell.keep],
        rule.strategy,
        classes if needs_classes(rule.strategy, options) else 0,
        options,
        embedded=lambda: [(chunk, part.embedding)],
    )
    return rows[cut.mask(chunk)]


def run_trial(
    run_uri: str,
    version: str,
    settings: PilotSettings,
    proxy: ProxySettings,
    plan: PilotPlan,
    rules: Mapping[str, ListRule],
    classes: int,
    gpu: bool,
    trial: PilotTrial,
) -> UnitResult:
    """Train on a list, test, and write which test samples are right. Runs in a task."""
    from raypipe.vision.devices import set_threads
    from raypipe.vision.fitting import fit, statistics_of, test

    watch, run = Stopwatch(), Run(run_uri)
    set_threads(1)
    samples = cached_samples(run_uri, version)
    cell, name = plan.cells[trial.cell], plan.lists[trial.list]
    rows = rows_of_list(samples, rules[name], cell, classes, settings.seed, trial.repeat)
    recipe = recipe_of(settings, proxy, plan.image_size, trial.repeat)
    device = "cuda" if gpu else "cpu"
    model = fit(
        recipe,
        samples.images,
        samples.labels,
        rows,
        classes,
        recipe.statistics(*statistics_of(samples.images[~samples.test])),
        device=device,
        keys=canonical_hashes(samples.ids),
    )
    images, labels = samples.images[samples.test], samples.labels[samples.test]
    correct = test(model, images, labels, classes, device).correct
    content: dict[str, Any] = {"samples": len(rows), "correct": pack(correct)}
    storage.write_json(storage.join(run.pilot_trainings_folder, f"{trial.name}.json"), content)
    return UnitResult(trial.name, len(rows), cpu_seconds=watch.lap())
