"""Fit the extrapolator to the samples of one part, and assess it, with cross-fitting.

Nothing that it depends on was fitted to the seed and audit samples of its part. So they all show
how well it predicts, and no other fit is needed to assess it. See `raypipe.runs.proxy_roles`.
"""

from __future__ import annotations

from raypipe.config import Config
from raypipe.progress import ProgressCallback
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.stages.extrapolate.measured import PartData, SampleSet
from raypipe.stages.extrapolate.model import ModelFiles, make_extrapolator, save_extrapolator
from raypipe.stages.extrapolate.predictions import (
    PredictedSamples,
    read_predictions,
    write_predictions,
)


def predictions_name(which: SampleSet, part: int) -> str:
    """Return the name of the file of predictions for the seed or audit samples of a part."""
    return f"{which}-{part}"


def part_predictions(part: int) -> str:
    """Return the file that `fit_part` writes last."""
    return f"{predictions_name('seed', part)}.parquet"


def fit_part(part: int, config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Write the extrapolator to the samples of a part, and its predictions of those measured.

    gnn fits a single network, tree ensemble and statistic: the other parts have theirs.
    """
    from raypipe.assessment.held_out import predict

    data = PartData(config, run, part)
    extrapolator = make_extrapolator(config, run, ProxyRoles.of(config).space(part))
    if config.extrapolate.method == "gnn":
        extrapolator.members = 1
    extrapolator.fit(data.seed.nodes, data.seed.score, step)
    save_extrapolator(ModelFiles.of(run, part), extrapolator)
    sets: tuple[SampleSet, ...] = ("audit", "seed")
    for which in sets:
        held_out = data.held_out.get(which)
        if held_out is None:
            continue
        predictions = predict(
            extrapolator,
            data.seed.nodes,
            data.seed.score,
            held_out.nodes,
            held_out.score,
            mlp=False,
        )
        write_predictions(run, predictions_name(which, part), held_out.ids, predictions)


def read_part_predictions(config: Config, run: Run, which: SampleSet) -> PredictedSamples | None:
    """Read the predictions of the seed or audit samples of all parts; None without any."""
    present = run.done("extrapolator")
    names = [predictions_name(which, part) for part in range(config.proxy.parts)]
    found = [read_predictions(run, name) for name in names if name in present]
    return PredictedSamples.concat(found) if found else None
