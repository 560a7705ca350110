"""Run the stages of a configuration in order.

A finished stage is skipped, an interrupted one is resumed, and one whose settings have changed is
run again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from importlib import import_module
from typing import Any

from raypipe import storage
from raypipe.config import Config, SourceSettings
from raypipe.distributed.context import Context
from raypipe.distributed.outside_code import changes, of_stage, report_unseen
from raypipe.errors import (
    ConfigError,
    MemoryShortageError,
    RaypipeError,
    ResourceError,
    RunError,
    TrustError,
)
from raypipe.plugins import code_allowed
from raypipe.progress import Progress
from raypipe.runs.intermediate import REMOVED, lacks, remove_intermediate
from raypipe.runs.layout import STAGE_FOLDERS
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import StageRecord, extrapolated_tables, injected_noise, now
from raypipe.runs.log_file import log_file
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.outside_code import FIELD
from raypipe.runs.overwrite import changed_source, check_folder, check_overwrite
from raypipe.runs.run import Run
from raypipe.scores.registry import check_scores
from raypipe.sources import open_source
from raypipe.sources.noise import requested_noise
from raypipe.sources.used_settings import refuse_unused_settings
from raypipe.stages.base import Stage
from raypipe.text import size as size_text

log = logging.getLogger("raypipe")
_STAGES = {
    "index": "raypipe.stages.index.stage:IndexStage",
    "seed": "raypipe.stages.seed.stage:SeedStage",
    "label": "raypipe.stages.pseudo_label:LabelStage",
    "proxy": "raypipe.stages.proxy.stage:ProxyStage",
    "measure": "raypipe.stages.measure.stage:MeasureStage",
    "rehearse": "raypipe.stages.rehearse:RehearseStage",
    "embed": "raypipe.stages.embed.stage:EmbedStage",
    "extrapolate": "raypipe.stages.extrapolate.stage:ExtrapolateStage",
    "pilot": "raypipe.stages.pilot.stage:PilotStage",
    "select": "raypipe.stages.select.stage:SelectStage",
    "report": "raypipe.stages.report:ReportStage",
}
STAGE_NAMES = tuple(_STAGES)
USING_RAY = {"seed", "proxy", "measure", "embed", "extrapolate"}
"""Stages that every run has and that need Ray."""
LESS_MEMORY = {
    "seed": "source.fragment_samples (a worker holds a fragment)",
    "label": "pseudo_labels.batch_size, or pseudo_labels.image_size of a backbone",
    "proxy": "proxy.batch_size, or proxy.parts, whose trainings run in parallel",
    "measure": "measure.batch_size or measure.max_actors",
    "embed": "embed.batch_size, embed.max_actors or source.fragment_samples "
    "(a worker holds a fragment)",
    "extrapolate": "extrapolate.max_actors or source.fragment_samples (a worker holds a fragment)",
    "pilot": "pilot.max_samples or pilot.image_size",
}
"""Settings to lower if workers run out of memory, by stage."""
SECONDS = ("wall_seconds", "cpu_seconds", "gpu_seconds")
"""What a record of a stage counts."""


def make_stage(name: str) -> Stage:
    """Return a stage by name. Its module, and with it Ray, is imported here and not before."""
    module, _, attribute = _STAGES[name].partition(":")
    return getattr(import_module(module), attribute)()


@code_allowed()
def execute(
    config: Config,
    dataset: Any = None,
    *,
    until: str | None = None,
    redo: Collection[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Run:
    """Run all stages, or all up to and including `until`.

    Parameters
    ----------
    config : Config
        The configuration, with absolute local paths.
    dataset : ray.data.Dataset, optional
        The source, instead of `config.source.uri`.
    until : str, optional
        Last stage to run.
    redo : collection of str
        Stages to run again, with those that depend on them.
    overwrite : bool
        Replace whatever run the folder holds, also one over another source.
    progress : Progress, optional
        Where to show progress.
    verbose : bool
        Show every finished fragment, and the output of Ray.

    Raises
    ------
    ConfigError
        For an unknown stage, a score that needs more epochs than the proxy has, or a tracker of
        `report.log_to` whose package is not installed.
    RunError
        If another driver holds the run, or if finished work would be lost that neither `redo` nor
        `overwrite` names.
    TrustError
        If the fidelity is too low to prune by. The report is written before it is raised.
    RaypipeError
        Whatever a stage raises.
    """
    for name in (*redo, *([until] if until is not None else [])):
        if name not in STAGE_FOLDERS:
            raise ConfigError(f"stage {name!r} is not one of {', '.join(STAGE_FOLDERS)}")
    check_scores(config)
    if config.report.log_to:
        from raypipe.report.trackers import check_trackers

        check_trackers(config.report.log_to)
    with storage.errors_of_storage(config.run):
        return _execute(
            config,
            dataset,
            until,
            _with_dependents(redo),
            overwrite,
            progress or Progress(verbose=verbose),
            verbose,
        )


def _execute(
    config: Config,
    dataset: Any,
    until: str | None,
    redo: Collection[str],
    overwrite: bool,
    progress: Progress,
    verbose: bool,
) -> Run:
    run, source = Run(config.run), config.source
    names = STAGE_NAMES if until is None else STAGE_NAMES[: STAGE_NAMES.index(until) + 1]
    config = _with_resolved_source(config, run, dataset)
    check_folder(run, reads_dataset=dataset is not None)
    context = Context(config, run, progress, verbose)
    _ = context.code  # what cannot be imported ends the run before it begins
    with Lease(run) as lease, log_file(run, verbose), closing(context):
        records = run.ledger() if run.exists() else {}
        lease.about = partial(driver_progress, progress, records)
        if extrapolated_tables(records):
            raise RunError(
                f"{run.uri}: written by `raypipe extrapolate` from tables; give another folder"
            )
        if overwrite and _reads_another_source(context, source, dataset):
            _remove_results(run, records)
        _check_noise(config, run, records)
        report_unseen(context.code, progress.say)
        _discard_outdated(context, records, names, redo, overwrite)
        if dataset is not None:
            from raypipe.distributed.ray_data.copy import copy_dataset

            copy_dataset(dataset, source, context)
        run.write_config(config)
        _run_stages(context, records, names)
        if until is None and "proxy" in records and not config.proxy.keep_intermediate:
            _remove_intermediate(context, records)
    return run


def _with_resolved_source(config: Config, run: Run, dataset: Any) -> Config:
    """Return the configuration with the source that the stages read, without `auto`."""
    if dataset is not None:
        from raypipe.distributed.ray_data.copy import settings_of_copy

        return config.model_copy(update={"source": settings_of_copy(config.source, run)})
    # resolved once here, instead of listing the source in every task
    opened = open_source(config.source)
    if not run.exists():  # leaving out a setting of an earlier run would redo its index
        refuse_unused_settings(config.source, opened.format)
    resolved = opened.resolved_settings(config.proxy.image_size)
    return config.model_copy(update={"source": resolved})


def _reads_another_source(context: Context, source: SourceSettings, dataset: Any) -> bool:
    """Return whether the source is another one than that of the run in the folder."""
    if dataset is None:
        return bool(changed_source(context.run, context.config))
    from raypipe.distributed.ray_data.copy import changed_dataset

    return bool(changed_dataset(dataset, source, context))


def _discard_outdated(
    context: Context,
    records: dict[str, StageRecord],
    names: Sequence[str],
    redo: Collection[str],
    overwrite: bool,
) -> None:
    """Check what the run would replace, and forget the stages that start from nothing.

    Raises
    ------
    RunError
        If finished work would be lost that neither `redo` nor `overwrite` names.
    ResourceError
        If the cluster lacks what a stage needs.
    """
    run, config = context.run, context.config
    outdated = _outdated(context, records, names)
    again = set(redo)
    if "measure" in {*outdated, *again} and lacks(records.get("proxy"), config):
        again |= _with_dependents({"proxy"})
    lost = [name for name in STAGE_NAMES if name in records and name in {*outdated, *again}]
    if not overwrite:
        unasked = [name for name in lost if name not in redo]
        code = [line for name in unasked for line in changes(records[name], name, context.code)]
        check_overwrite(run, records, config, unasked, code)
    planned = [
        name
        for name in names
        if name in lost or name not in records or records[name].state != "done"
    ]
    context.check_cluster(USING_RAY.intersection(planned))
    for name in planned:
        make_stage(name).check(context)
    for name in again:
        records.pop(name, None)  # a stage without a record starts from nothing
    if again or not run.exists():
        run.write_ledger(records)  # from here on the folder holds a run


def _run_stages(context: Context, records: dict[str, StageRecord], names: Sequence[str]) -> None:
    """Bring the named stages to the state `done`; raise a TrustError only after all of them."""
    run, config = context.run, context.config
    refusal: TrustError | None = None
    for name in names:
        stage = make_stage(name)
        if not stage.applies_to(config):
            if records.pop(name, None) is not None:
                run.write_ledger(records)
                run.clear(name)
            continue
        try:
            advance(stage, context, records)
        except TrustError as error:
            refusal = error
        context.config = for_seed_set(config, run)
    if refusal is not None:
        raise refusal


def _remove_intermediate(context: Context, records: dict[str, StageRecord]) -> None:
    """Remove what the finished run no longer needs, and record it in the ledger."""
    removed, size = remove_intermediate(context.run, context.config)
    if records["proxy"].detail.get(REMOVED, []) != removed:
        records["proxy"].detail[REMOVED] = removed
        context.run.write_ledger(records)
    if size:
        context.progress.say(
            f"removed     {size_text(size)} of files of the trainings that no score needs "
            "(proxy.keep_intermediate)"
        )


def _with_dependents(stages: Collection[str]) -> set[str]:
    """Return the stages, and all that depend on them."""
    result = set(stages)
    for name in STAGE_NAMES if stages else ():
        if result & set(make_stage(name).needs):
            result.add(name)
    return result


def for_seed_set(config: Config, run: Run) -> Config:
    """Return the configuration for the seed set of a run: `proxy.epochs: auto` is a number.

    Without a seed set, the configuration is unchanged.
    """
    try:
        return config.for_seed_set(SeedManifest.read(run).samples)
    except FileNotFoundError:
        return config


def _outdated(
    context: Context, records: Mapping[str, StageRecord], names: Sequence[str]
) -> set[str]:
    """Return which of the named stages in the ledger would be run again, or removed."""
    fingerprints: dict[str, str] = {}
    result = set()
    config = for_seed_set(context.config, context.run)
    for name in names if records else ():
        stage = make_stage(name)
        if stage.applies_to(config):
            inputs = [fingerprints[need] for need in stage.needs if need in fingerprints]
            fingerprints[name] = stage.fingerprint(config, context.code, inputs)
        if name in records and records[name].fingerprint != fingerprints.get(name):
            result.add(name)
    return result


def _remove_results(run: Run, records: dict[str, StageRecord]) -> None:
    """Remove what the stages of a run and its evaluations wrote, and the copy of a dataset."""
    records.clear()
    run.write_ledger(records)
    for name in STAGE_NAMES:
        run.clear(name)
    storage.delete(run.source_copy)
    storage.delete(run.evaluation_folder)


def _check_noise(config: Config, run: Run, records: dict[str, StageRecord]) -> None:
    """Raise RunError if the run folder was written with other injected label noise.

    Otherwise a real run would be replaced by one with wrong labels, or the other way round.
    """
    before, requested = injected_noise(records), requested_noise(config.source)
    if "index" in records and records["index"].state == "done" and before != requested:
        noise = f"{before.share:g} with noise_seed {before.seed}" if before else "0"
        raise RunError(
            f"{run.uri}: written with source.inject_noise {noise}; give a run with other label "
            "noise its own run folder (`run`)"
        )


def advance(stage: Stage, context: Context, records: dict[str, StageRecord]) -> None:
    """Bring one stage to the state `done`, and keep its record in the ledger up to date."""
    run, name = context.run, stage.name
    # A stage that this one needs does not exist in every run.
    inputs = [records[need].fingerprint for need in stage.needs if need in records]
    current = stage.fingerprint(context.config, context.code, inputs)
    record = records.get(name)
    if record is not None and record.fingerprint != current:
        reason = " and ".join(changes(record, name, context.code)) or stage.changed
        context.progress.say(f"{name:<11} {reason}: running it again")
        stage.clear(context)
        spent = {name: getattr(record, name) for name in SECONDS} if stage.reuses(context) else {}
        record = StageRecord(fingerprint=current, detail=dict(stage.detail), **spent)
    elif record is None:
        run.clear(name)  # files without a record cannot be trusted
    if record is not None and record.state == "done" and stage.complete(context, record):
        context.progress.say(f"{name:<11} already done: {record.samples:,} samples")
        return
    record = record or StageRecord(fingerprint=current, detail=dict(stage.detail))
    record.state, record.error, record.attempts = "running", "", record.attempts + 1
    records[name] = record
    run.write_ledger(records)
    started = time.monotonic()
    try:
        _execute_stage(stage, context, record)
        _note_code(record, name, context)
        record.state, record.finished = "done", now()
    except BaseException as error:
        _note_code(record, name, context)
        record.state = "refused" if isinstance(error, TrustError) else "failed"
        record.error = str(error) or type(error).__name__
        record.wall_seconds += time.monotonic() - started
        try:
            run.write_ledger(records)
        except OSError:
            log.exception("the ledger could not be written")
        raise
    record.wall_seconds += time.monotonic() - started
    run.write_ledger(records)
    context.progress.say(
        f"{name:<11} {record.samples:,} samples in {time.monotonic() - started:.1f} s"
    )


def _note_code(record: StageRecord, name: str, context: Context) -> None:
    """Record which code a stage ran with, so that the next run can name what has changed."""
    if code := of_stage(name, context.code):
        record.detail[FIELD] = code


def _execute_stage(stage: Stage, context: Context, record: StageRecord) -> None:
    """Execute a stage, and turn interrupts and a lack of memory into errors that explain them."""
    name = stage.name
    try:
        context.refresh_cluster()
        stage.execute(context, record)
    except KeyboardInterrupt:
        if context.run.lease is not None:
            context.run.lease.check()
        if context.gave_up_waiting:
            raise ResourceError(f"{name}: {context.gave_up_waiting}") from None
        raise
    except ConfigError as error:  # such as code of the user's own that returns no pixels
        error.exit_code = RaypipeError.exit_code
        raise
    except MemoryShortageError as error:
        remedy = f"Lower {LESS_MEMORY[name]}, or use" if name in LESS_MEMORY else "Use"
        raise MemoryShortageError(
            f"{name}: {error}. {remedy} machines with more memory; then rerun to resume"
        ) from error


def driver_progress(progress: Progress, records: dict[str, StageRecord]) -> dict[str, Any]:
    """Return what `raypipe status` shows of a running run in addition to its ledger."""
    seconds = {
        name: float(sum(getattr(item, name) for item in list(records.values())))
        for name in ("cpu_seconds", "gpu_seconds")
    }
    return {**progress.about(), **seconds}
