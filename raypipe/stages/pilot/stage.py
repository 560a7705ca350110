"""Pilot: find out on the seed set whether keep-lists help, before lists of the source are used.

Small networks are trained on lists of the candidate strategies and on random lists within classes,
cut from the seed set and from parts of it, and tested on the audit set. Trainings of a repeat share
weights and order. Writes, under `pilot/`:

- `samples.parquet`: pixels, labels and scores of all samples;
- `plan.json`: the trainings, decided once;
- `trainings/<repeat>-<cell>-<list>.json`: which test samples a model got right. A training with
  this file is never repeated;
- `pilot.json`: all of it together; written last.

What follows from it is computed where it is needed (`raypipe.assessment.pilot_trend`): for any keep
fraction, and for as many samples as the source has by then.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.config import Config
from raypipe.config.pilot import CANDIDATE_OPTIONS, random_settings, settings_of_candidate
from raypipe.distributed.context import Context
from raypipe.distributed.nodes import run_on_share
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.packed_bits import unpack
from raypipe.runs.pilot import RANDOM, Pilot, PilotPlan, PilotTrial
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult
from raypipe.stages.base import Stage
from raypipe.stages.pilot.plan import make_plan
from raypipe.stages.pilot.samples import ListRule, collect_samples
from raypipe.stages.pilot.trial import run_trial
from raypipe.stages.select.options import options_of

TRAININGS_PER_GPU = 4
"""The networks are small; one alone leaves a GPU idle most of the time."""


class PilotStage(Stage):
    """Train on lists of the seed set."""

    name = "pilot"
    needs = ("extrapolate",)

    def applies_to(self, config: Config) -> bool:
        return config.pilots

    def settings(self, config: Config) -> dict[str, Any]:
        select = config.select.model_dump(mode="json", include={"seed", *CANDIDATE_OPTIONS})
        return {**config.pilot.model_dump(mode="json", exclude={"enabled"}), "select": select}

    def complete(self, context: Context, record: StageRecord) -> bool:
        return storage.exists(context.run.pilot_result)

    def execute(self, context: Context, record: StageRecord) -> None:
        run = context.run
        if not storage.exists(run.pilot_plan):
            context.run_tasks(
                [record.fingerprint],
                functools.partial(_prepare, context.config, run.uri),
                record.add_cost,
            )
        plan = PilotPlan.from_json(storage.read_json(run.pilot_plan))
        if plan.repeats:
            _train(context, record, plan)
        if plan.note:
            context.progress.say(f"note: pilot: {plan.note}")
        started = time.process_time()
        Pilot(plan, _results(run, plan)).write(run)
        storage.delete(run.pilot_samples)
        record.cpu_seconds += time.process_time() - started
        record.samples = plan.samples
        record.detail = {
            "trainings": len(plan.trials()),
            "candidates": [name for name, _ in plan.candidates],
            "tested": plan.tested,
            "note": plan.note,
        }


def _prepare(config: Config, run_uri: str, _: str) -> UnitResult:
    """Write the samples, and then the plan. Runs in a task."""
    watch, run = Stopwatch(), Run(run_uri)
    rules = _rules(config, run, config.pilot.named_candidates())
    samples = collect_samples(config, run, rules.values())
    listed = int((~samples.test).sum())
    plan = make_plan(
        config,
        SeedManifest.read(run).samples,
        listed,
        int(samples.test.sum()),
        len(np.unique(samples.labels)),
        samples.images.shape[-1],
    )
    if plan.repeats:
        samples.write(run)
    storage.write_json(run.pilot_plan, plan.as_json())
    return UnitResult("", listed, cpu_seconds=watch.lap())


def _train(context: Context, record: StageRecord, plan: PilotPlan) -> None:
    """Run the trainings that have no result yet, in tasks side by side."""
    config, run = context.config, context.run
    done = storage.names(run.pilot_trainings_folder)
    trials = plan.trials()
    missing = [trial for trial in trials if f"{trial.name}.json" not in done]
    gpu = bool(missing) and context.cluster.use_gpu(config.proxy.use_gpu)
    function = functools.partial(
        run_trial,
        run.uri,
        record.fingerprint,
        config.pilot,
        config.proxy,
        plan,
        _rules(config, run, plan.candidates),
        len(run.classes().names),
        gpu,
    )
    with context.progress.meter("pilot", len(trials), "trainings") as meter:
        meter.already(len(trials) - len(missing))

        def collect(result: UnitResult) -> None:
            meter.add(1)
            record.add_cost(result)

        if gpu:
            run_on_share(missing, function, collect, 1, 1 / TRAININGS_PER_GPU)
        else:
            context.run_tasks(missing, function, collect)


def _rules(
    config: Config, run: Run, candidates: Iterable[tuple[str, Mapping[str, Any]]]
) -> dict[str, ListRule]:
    """Return how the lists are cut, by name.

    Without `parts`: all samples here are in the seed set, and a part of it is small.
    """
    settings = {RANDOM: random_settings(config.select)} | {
        name: settings_of_candidate(config.select, changes) for name, changes in candidates
    }
    return {
        name: ListRule(
            section.strategy,
            replace(options_of(run, section), weights="none", min_per_class=0, parts=None),
        )
        for name, section in settings.items()
    }


def _results(run: Run, plan: PilotPlan) -> dict[str, np.ndarray]:
    """Read the results of all trainings; see `Pilot.correct`."""
    if not plan.repeats:
        return {}
    shape = (len(plan.cells), plan.repeats, plan.tested)
    correct = {name: np.zeros(shape, bool) for name in plan.lists}

    def read(trial: PilotTrial) -> dict[str, Any]:
        return storage.read_json(storage.join(run.pilot_trainings_folder, f"{trial.name}.json"))

    for trial, result in storage.ahead(read, plan.trials(), run.uri):
        name, cell = plan.lists[trial.list], plan.cells[trial.cell]
        if result["samples"] != cell.samples:
            raise StageError(
                f"{run.uri}: pilot/trainings/{trial.name}.json is of {result['samples']} samples "
                f"instead of {cell.samples}; delete pilot/ and rerun"
            )
        correct[name][trial.cell, trial.repeat] = unpack(result["correct"], (plan.tested,))
    return correct
