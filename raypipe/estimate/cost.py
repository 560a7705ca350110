"""Estimate a run: the work of every stage, from settings and size of the source, times rates.

The estimate is for decisions (minutes or days, one machine or twenty), not for billing. It does not
know how fast the storage is, nor what else the machines do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from raypipe.config import Config
from raypipe.estimate import rates
from raypipe.estimate.describe_network import describe_features, describe_network
from raypipe.estimate.efforts import efforts
from raypipe.estimate.facts import CostEstimate, StageEstimate, Survey
from raypipe.estimate.seed_size import small_seed_set
from raypipe.estimate.volumes import bytes_read, bytes_written
from raypipe.estimate.workload import Effort, Machine, Workload, this_machine
from raypipe.runs.ledger import StageRecord
from raypipe.runs.rejects import foreseen_rejects
from raypipe.runs.run import Run

__all__ = ["Machine", "estimate", "scaled_efforts", "this_machine"]

LAST_STAGES = ("select", "report")
"""Stages that are never scaled from a ledger: they are short."""


def estimate(
    survey: Survey,
    config: Config,
    machine: Machine,
    *,
    settings: str = "default settings",
    like: str | None = None,
) -> CostEstimate:
    """Estimate what a run over an inspected source would cost.

    Parameters
    ----------
    survey, config, machine
        Source, settings and place of the run.
    settings
        A description of the configuration.
    like
        An earlier run, finished or not, whose ledger is scaled to this one.

    Raises
    ------
    RunError
        If `like` is not a run.
    """
    work = Workload.of_survey(survey, config)
    by_constants = efforts(work, machine)
    scaled = scaled_efforts(work, by_constants, machine, like) if like is not None else {}
    stages = tuple(
        _stage_estimate(stage, scaled.get(stage, effort), machine, from_run=stage in scaled)
        for stage, effort in by_constants.items()
    )
    used_bytes = survey.bytes * work.samples / max(1, survey.samples)
    return CostEstimate(
        machine=str(machine),
        settings=settings,
        samples=work.samples,
        seed_samples=work.seed,
        stages=stages,
        low=round(sum(stage.low for stage in stages), 1),
        high=round(sum(stage.high for stage in stages), 1),
        cpu_hours=sum(stage.cpu_seconds for stage in stages) / 3600,
        gpu_hours=sum(stage.gpu_seconds for stage in stages) / 3600,
        bytes_read=bytes_read(work, used_bytes, survey.reads_singly),
        bytes_written=bytes_written(work),
        basis=tuple(_basis(work, machine, by_constants, scaled, like)),
        warnings=tuple(_warnings(work, survey)),
        network=describe_network(config.proxy),
        features=describe_features(config),
    )


def _warnings(work: Workload, survey: Survey) -> Iterator[str]:
    """Yield sentences on what would go wrong."""
    if too_small := small_seed_set(work, survey.balance):
        yield too_small
    if survey.unreadable_problem:
        yield f"a run stops in the stage index: {survey.unreadable_problem}"
    rejects = survey.rejects
    allowed = work.config.source.max_reject_fraction
    if foreseen := foreseen_rejects(rejects.count, rejects.drawn, work.samples, allowed):
        yield foreseen
    if too_few := work.config.proxy.too_few_steps(work.seed):
        yield too_few


def _stage_estimate(
    stage: str, effort: Effort, machine: Machine, *, from_run: bool
) -> StageEstimate:
    less, more = rates.SPREAD["run" if from_run else "gpu" if effort.gpu else "cpu"]
    seconds, start = effort.wall_seconds(machine), rates.START_SECONDS[stage]
    return StageEstimate(
        stage,
        cpu_seconds=round(effort.cpu, 1),
        gpu_seconds=round(effort.gpu, 1),
        low=round(start / 2 + less * seconds, 1),
        high=round(2 * start + more * seconds, 1),
    )


def _basis(
    work: Workload,
    machine: Machine,
    by_constants: Mapping[str, Effort],
    scaled: Mapping[str, Effort],
    like: str | None,
) -> list[str]:
    """Return sentences on what the estimate is based on."""
    if like is not None:
        rest = [
            stage
            for stage, effort in by_constants.items()
            if stage not in (*scaled, *LAST_STAGES) and effort.cpu + effort.gpu
        ]
        basis = [
            f"scaled from the ledger of {like}, assuming similar images"
            + (f"; constants for {', '.join(rest)}" if rest else "")
        ]
    else:
        basis = [
            "constants of raypipe.estimate.rates, measured on one server core; "
            "--like RUN scales one of your own runs instead"
        ]
    if work.decode_seconds:
        basis.append(f"decoding measured here: {work.decode_seconds * 1e3:.2f} ms per image")
    want_gpus = [
        name
        for name in ("proxy", "measure", "embed", "extrapolate")
        if getattr(work.config, name).use_gpu is True
    ]
    if want_gpus and not machine.gpus:
        basis.append(
            f"the settings require GPUs ({', '.join(want_gpus)}), but none is available, so the "
            "estimate is for CPUs; --gpus N estimates with GPUs"
        )
    if any(effort.gpu for stage, effort in by_constants.items() if stage not in scaled):
        basis.append(
            "GPU rates are assumed to be about those of a T4; other GPUs are up to ten times faster"
        )
    return basis


def scaled_efforts(
    work: Workload, by_constants: Mapping[str, Effort], machine: Machine, like: str
) -> dict[str, Effort]:
    """Scale what the stages of an earlier run took to this one.

    The scale of a stage is the ratio of what the constants give for the two runs. Stages that
    cannot be scaled are left out.

    Raises
    ------
    RunError
        If `like` is not a run.
    """
    run = Run(like)
    records = run.ledger()
    if any(stage not in records or records[stage].state != "done" for stage in ("index", "seed")):
        return {}
    gpus = any(record.gpu_seconds for record in records.values())
    earlier = efforts(
        Workload.of_run(run, records, work), replace(machine, gpus=1.0 if gpus else 0.0)
    )
    scaled = {}
    for stage, effort in by_constants.items():
        if stage in records and stage in earlier and stage not in LAST_STAGES:
            found = _scaled(effort, records[stage], earlier[stage])
            if found is not None:
                scaled[stage] = found
    return scaled


def _scaled(effort: Effort, record: StageRecord, earlier: Effort) -> Effort | None:
    """Scale one stage; None if its record does not allow it."""
    # seconds on a GPU say nothing about seconds on a CPU
    if record.state != "done" or bool(effort.gpu) != bool(record.gpu_seconds):
        return None
    if not record.cpu_seconds or not earlier.cpu:
        return None
    gpu = record.gpu_seconds * effort.gpu / earlier.gpu if effort.gpu and earlier.gpu else 0.0
    return Effort(record.cpu_seconds * effort.cpu / earlier.cpu, gpu, effort.shared_by)
