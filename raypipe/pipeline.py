"""Run the stages of a configuration in order.

A finished stage is skipped, an interrupted one is resumed, and one whose settings have changed is
run again.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import (
    ConfigError,
    MemoryShortageError,
    RaypipeError,
    ResourceError,
    RunError,
    TrustError,
)
from raypipe.progress import Progress
from raypipe.runs.layout import STAGE_FOLDERS
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import StageRecord, extrapolated_tables, fingerprint, injected_noise, now
from raypipe.runs.run import Run
from raypipe.scores.registry import check_scores
from raypipe.sources import open_source
from raypipe.sources.noise import requested_noise
from raypipe.sources.used_settings import refuse_unused_settings
from raypipe.stages.base import Stage

log = logging.getLogger("raypipe")
_STAGES = {
    "index": "raypipe.stages.index.stage:IndexStage",
    "seed": "raypipe.stages.seed.stage:SeedStage",
    "label": "raypipe.stages.pseudo_label:LabelStage",
    "proxy": "raypipe.stages.proxy.stage:ProxyStage",
    "measure": "raypipe.stages.measure.stage:MeasureStage",
    "rehearse": "raypipe.stages.rehearse:RehearseStage",
    "embed": "raypipe.stages.embed:EmbedStage",
    "extrapolate": "raypipe.stages.extrapolate.stage:ExtrapolateStage",
    "select": "raypipe.stages.select.stage:SelectStage",
    "report": "raypipe.stages.report:ReportStage",
}
STAGE_NAMES = tuple(_STAGES)
LESS_MEMORY = {
    "seed": "source.fragment_samples (a worker holds a fragment)",
    "label": "pseudo_labels.batch_size, or pseudo_labels.image_size of a backbone",
    "proxy": "proxy.batch_size, or proxy.parts, whose trainings run in parallel",
    "measure": "measure.batch_size or measure.max_actors",
    "embed": "embed.batch_size, embed.max_actors or source.fragment_samples "
    "(a worker holds a fragment)",
    "extrapolate": "extrapolate.max_actors or source.fragment_samples (a worker holds a fragment)",
}
"""Settings to lower if workers run out of memory, by stage."""


def make_stage(name: str) -> Stage:
    """Return a stage by name. Its module, and with it Ray, is imported here and not before."""
    module, _, attribute = _STAGES[name].partition(":")
    return getattr(import_module(module), attribute)()


def execute(
    config: Config,
    dataset: Any = None,
    *,
    until: str | None = None,
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
        If another driver holds the run.
    TrustError
        If the fidelity is too low to prune by. The report is written before it is raised.
    RaypipeError
        Whatever a stage raises.
    """
    if until is not None and until not in STAGE_FOLDERS:
        raise ConfigError(f"stage {until!r} is not one of {', '.join(STAGE_FOLDERS)}")
    check_scores(config)
    if config.report.log_to:
        from raypipe.report.trackers import check_trackers

        check_trackers(config.report.log_to)
    with errors_of_storage(config.run):
        return _execute(config, dataset, until, progress or Progress(verbose=verbose), verbose)


def _execute(
    config: Config, dataset: Any, until: str | None, progress: Progress, verbose: bool
) -> Run:
    run, source = Run(config.run), config.source
    if dataset is not None:
        from raypipe.distributed.ray_data.copy import copy_dataset, settings_of_copy

        config = config.model_copy(update={"source": settings_of_copy(source, run)})
    else:  # resolve `auto` once here, instead of listing the source in every task
        opened = open_source(source)
        if not run.exists():  # leaving out a setting of an earlier run would redo its index
            refuse_unused_settings(source, opened.format)
        config = config.model_copy(
            update={"source": opened.resolved_settings(config.proxy.image_size)}
        )
    context = Context(config, run, progress, verbose)
    with Lease(run) as lease, log_file(run, verbose), closing(context):
        records = run.ledger() if run.exists() else {}
        lease.about = partial(driver_progress, progress, records)
        if extrapolated_tables(records):
            raise RunError(
                f"{run.uri}: written by `raypipe extrapolate` from tables; give another folder"
            )
        _check_noise(config, run, records)
        if dataset is not None:
            copy_dataset(dataset, source, context)
        run.write_config(config)
        names = STAGE_NAMES if until is None else STAGE_NAMES[: STAGE_NAMES.index(until) + 1]
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
        if refusal is not None:
            raise refusal
    return run


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
    current = fingerprint(name, stage.settings(context.config), inputs)
    record = records.get(name)
    if record is not None and record.fingerprint != current:
        context.progress.say(f"{name:<11} {stage.changed}: running it again")
        stage.clear(context)
        record = None
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
        record.state, record.finished = "done", now()
    except BaseException as error:
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


@contextmanager
def errors_of_storage(uri: str) -> Iterator[None]:
    """Turn storage that fails permanently into a one-line error that names it."""
    try:
        yield
    except RaypipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if getattr(error, "filename", None) else f"{uri}: "
        raise RaypipeError(
            f"{where}{error.strerror or error}. Fix this and rerun to resume"
        ) from error


@contextmanager
def log_file(run: Run, verbose: bool = False) -> Iterator[None]:
    """Also write all messages to RUN/logs/<start>.log, with `verbose` a line per fragment."""
    handler = _LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    uri = storage.join(run.logs_folder, now().replace(":", "") + ".log")
    handler.store = lambda text: storage.write_bytes(uri, text.encode())
    try:
        yield
    except BaseException as error:
        log.error("stopped: %s", error if isinstance(error, RaypipeError) else repr(error))
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError, RunError):  # the stages report broken storage
            handler.save()
        log.setLevel(level)


class _LogHandler(logging.Handler):
    """Keeps the last lines and writes them all for every new line: object stores cannot append.

    Lines about fragments are written with the next other line, or after PAUSE seconds.
    """

    MAX_LINES, PAUSE = 5000, 10.0

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=self.MAX_LINES)
        self._stored, self._changed = -math.inf, False
        self.store = lambda text: None

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
        self._changed = True
        if record.levelno <= logging.DEBUG and time.monotonic() - self._stored < self.PAUSE:
            return
        # the stages report broken storage and a run that was taken over
        with suppress(OSError, RunError):
            self.save()

    def save(self) -> None:
        """Write the lines if there are new ones. Raises what storage raises."""
        if self._changed:
            self._stored, self._changed = time.monotonic(), False
            self.store("\n".join(self._lines) + "\n")
