"""Fit and assess the extrapolator and, where its graph spans the whole source, apply it.

Each step is a task with one thread (the networks are small, and more threads mostly wait for one
another) that writes a file under `extrapolator/`: `model.json` and `model.safetensors` from the fit
on the whole seed set, and the files of `raypipe.stages.extrapolate.assess`. Steps that do not need
one another run side by side. An interrupted stage repeats only the missing ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.step_tasks import StepFunction, run_step_functions
from raypipe.progress import ProgressCallback
from raypipe.runs.measured_scores import every_measured_score
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.runs.score_shards import write_scores
from raypipe.stages.extrapolate.assess import (
    assesses_published,
    fold_count,
    is_assessed,
    write_curve,
    write_fidelity,
    write_fold,
    write_published_predictions,
    write_rehearsal,
)
from raypipe.stages.extrapolate.fit_part import fit_part, part_predictions
from raypipe.stages.extrapolate.measured import FitData
from raypipe.stages.extrapolate.model import (
    TRANSFER,
    WHOLE_METHODS,
    ModelFiles,
    has_rehearsal,
    load_extrapolator,
    load_intervals,
    make_extrapolator,
    save_extrapolator,
)
from raypipe.stages.extrapolate.probe import fit_probes


@dataclass(frozen=True)
class FitStep:
    """One step: its name in the progress display, the file it writes, and its function."""

    name: str
    file: str
    function: StepFunction


def fit_extrapolator(context: Context, missing: list[str], samples: int) -> float:
    """Run the steps of fitting and assessing whose files are missing.

    Parameters
    ----------
    context
        The run.
    missing
        Fragments without scores; they are scored where the graph spans the whole source.
    samples
        Samples in the source.

    Returns
    -------
    float
        Processor seconds.
    """
    config, run = context.config, context.run
    whole = config.extrapolate.method in WHOLE_METHODS
    present = storage.names(run.extrapolator_folder)
    steps = {
        step.name: step.function
        for step in _steps(config, run, samples)
        if step.file not in present
    }
    # one graph over the whole source at a time fits into memory
    groups = [{name: function} for name, function in steps.items()] if whole else [steps]
    if not is_assessed(config, run) and not config.scores_embeddings:
        groups.append({"fidelity": write_fidelity})
    if whole and missing:
        groups.append({"score": functools.partial(_score_whole, missing)})
    context.start_ray()
    return sum(run_step_functions(context, group, samples) for group in groups if group)


def _steps(config: Config, run: Run, samples: int) -> Iterator[FitStep]:
    """Yield all steps that do not need one another, the longest first."""
    if config.scores_embeddings:
        yield FitStep("probe", storage.name(run.probe_weights), fit_probes)
        return
    if config.proxy.cross_fits:
        for part in range(config.proxy.parts):
            step = functools.partial(fit_part, part)
            yield FitStep(f"fit-{part}", part_predictions(part), step)
        yield FitStep("curve", "curve.json", write_curve)
        return
    if assesses_published(config, samples):
        yield FitStep("published", "published.parquet", write_published_predictions)
    yield FitStep("fit", "model.json", _fit)
    for number in range(fold_count(config, run)):
        function = functools.partial(write_fold, number)
        yield FitStep(f"judge-{number}", f"fold-{number}.parquet", function)
    yield FitStep("curve", "curve.json", write_curve)
    if has_rehearsal(run):
        yield FitStep("rehearse", TRANSFER, write_rehearsal)


def _fit(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Write the extrapolator fitted on the whole seed set."""
    data = FitData(config, run, samples, config.extrapolate.method in WHOLE_METHODS)
    extrapolator = make_extrapolator(config, run, ProxyRoles.of(config).space(0))
    if data.source is not None:
        extrapolator.fit_graph(data.source.nodes, data.seed.rows, data.seed.score, step)
    else:
        extrapolator.fit(data.seed.nodes, data.seed.score, step)
    save_extrapolator(ModelFiles.of(run), extrapolator)


def _score_whole(
    fragments: list[str], config: Config, run: Run, samples: int, step: ProgressCallback
) -> None:
    """Write the score shards of some fragments from the graph over the whole source."""
    data = FitData(config, run, samples, whole=True)
    assert data.source is not None
    nodes, tables = data.source.nodes, data.source.tables
    scores = every_measured_score(run, config.score)
    extrapolator, intervals = load_extrapolator(config, run), load_intervals(run)
    extrapolator.attach_graph(nodes)
    for number, fragment in enumerate(fragments):
        position = data.names.index(fragment)
        rows = data.source.places[position]
        own = nodes.take(rows)
        predicted = extrapolator.predict_rows(rows)
        half_width = intervals.around(predicted, extrapolator.doubt(own), own.label)
        write_scores(run, fragment, tables[position], predicted, half_width, scores)
        step(number + 1, len(fragments))
