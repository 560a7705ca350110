"""Fitting the extrapolator: judging it, fitting it, and, where its graph is over the whole source, applying it.

Each part is a task of one thread (the networks are small, and more threads mostly wait for one another) that writes a file under
`extrapolator/`: `model.json` and `model.safetensors` from the fit on the whole seed set, and what `raypipe.stages.extrapolate.assess` says.
Parts that do not need one another run side by side; an interrupted stage repeats only those that are missing.
"""

from __future__ import annotations

import functools

import numpy as np

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.step_tasks import StepFunction, run_step_functions
from raypipe.progress import ProgressCallback
from raypipe.runs.layout import Run
from raypipe.runs.measured_scores import every_measured_score
from raypipe.runs.score_shards import write_scores
from raypipe.stages.extrapolate.assess import (
    TRANSFER,
    assesses_published,
    fold_count,
    has_rehearsal,
    is_assessed,
    load_extrapolator,
    load_intervals,
    make_extrapolator,
    write_curve,
    write_fidelity,
    write_fold,
    write_published,
    write_rehearsal,
)
from raypipe.stages.extrapolate.measured import WHOLE_METHODS, FitData


def fit_extrapolator(context: Context, missing: list[str], samples: int) -> float:
    """Do what of fitting, judging and (for a graph over the whole source) scoring of the `missing` fragments is not done yet.

    Returns processor seconds.
    """
    config, run = context.config, context.run
    whole, there = (
        config.extrapolate.method in WHOLE_METHODS,
        storage.names(run.path("extrapolator")),
    )
    wanted: dict[str, tuple[str, StepFunction]] = {}
    if assesses_published(config, samples):
        wanted["published"] = (
            "published.parquet",
            write_published,
        )  # first, since it takes longest
    wanted["fit"] = ("model.json", _fit)
    for number in range(fold_count(config, run)):
        wanted[f"judge-{number}"] = (
            f"fold-{number}.parquet",
            functools.partial(write_fold, number),
        )
    wanted["curve"] = ("curve.json", write_curve)
    if has_rehearsal(run):
        wanted["rehearse"] = (TRANSFER, write_rehearsal)
    left = {name: part for name, (file, part) in wanted.items() if file not in there}
    # a graph over the whole source is held once at a time
    groups = [{name: part} for name, part in left.items()] if whole else [left]
    if not is_assessed(config, run):
        groups.append({"fidelity": write_fidelity})
    if whole and missing:
        groups.append({"score": functools.partial(_score_whole, missing)})
    context.start_ray()
    return sum(run_step_functions(context, group, samples) for group in groups if group)


def _fit(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Write the extrapolator fitted on the whole seed set."""
    from safetensors.numpy import save

    data = FitData(config, run, samples, config.extrapolate.method in WHOLE_METHODS)
    extrapolator = make_extrapolator(config, run)
    if data.whole:
        extrapolator.fit_graph(data.everything, data.seed.rows, data.seed.score, step)
    else:
        extrapolator.fit(data.seed.nodes, data.seed.score, step)
    tensors, meta = extrapolator.state()
    storage.write_bytes(run.path("extrapolator", "model.safetensors"), save(tensors))
    storage.write_json(run.path("extrapolator", "model.json"), meta)


def _score_whole(
    fragments: list[str], config: Config, run: Run, samples: int, step: ProgressCallback
) -> None:
    """Write the score shards of some fragments from the graph over the whole source."""
    data, scores = (
        FitData(config, run, samples, whole=True),
        every_measured_score(run, config.score),
    )
    extrapolator, intervals = load_extrapolator(config, run), load_intervals(run)
    extrapolator.attach_graph(data.everything)
    offsets = np.cumsum([0, *(len(table) for table in data.tables)])
    for number, fragment in enumerate(fragments):
        position = data.names.index(fragment)
        part = np.arange(offsets[position], offsets[position + 1])
        nodes = data.everything.take(part)
        half_width = intervals.half_width(extrapolator.difficulty(nodes), nodes.label)
        write_scores(
            run,
            fragment,
            data.tables[position],
            extrapolator.predict_rows(part),
            half_width,
            scores,
        )
        step(number + 1, len(fragments))
