"""Runs the stages of a configuration in order: skips what is done, resumes what is not, redoes what a setting changed."""

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
from raypipe.errors import ConfigError, MemoryShortageError, RaypipeError, ResourceError, RunError, TrustError
from raypipe.progress import Progress
from raypipe.rundir import STAGE_FOLDERS, Lease, Run, StageRecord, fingerprint, noise_of, now, tables_of
from raypipe.scores.base import check_scores
from raypipe.sources import open_source
from raypipe.sources.noise import noise_wanted
from raypipe.stages.base import Context, Stage

log = logging.getLogger("raypipe")

_STAGES = {
    "index": "raypipe.stages.index:IndexStage",
    "seed": "raypipe.stages.seed:SeedStage",
    "label": "raypipe.stages.label:LabelStage",
    "proxy": "raypipe.stages.proxy:ProxyStage",
    "measure": "raypipe.stages.measure:MeasureStage",
    "rehearse": "raypipe.stages.rehearse:RehearseStage",
    "embed": "raypipe.stages.embed:EmbedStage",
    "extrapolate": "raypipe.stages.extrapolate:ExtrapolateStage",
    "select": "raypipe.stages.select:SelectStage",
    "report": "raypipe.stages.report:ReportStage",
}
STAGE_NAMES = tuple(_STAGES)
LESS_MEMORY = {
    "seed": "source.fragment_samples (a worker holds a fragment)",
    "label": "pseudo_labels.batch_size, or pseudo_labels.image_size of a backbone",
    "proxy": "proxy.batch_size, or proxy.parts, whose trainings run side by side",
    "measure": "measure.batch_size or measure.max_actors",
    "embed": "embed.batch_size, embed.max_actors or source.fragment_samples (a worker holds a fragment)",
    "extrapolate": "extrapolate.max_actors or source.fragment_samples (a worker holds a fragment)",
}
"""By stage: what to lower where workers run out of memory."""
MORE_THAN_TABLES = {
    "gnn-published": "the graph of a whole source in memory",
    "proxy": "what a proxy says of each sample",
}
"""What extrapolators need that `extrapolate` does not have."""


def make_stage(name: str) -> Stage:
    """A stage by name; its module, and with it Ray, is imported here and not before."""
    module, _, attribute = _STAGES[name].partition(":")
    return getattr(import_module(module), attribute)()


def execute(
    config: Config, dataset: Any = None, *, until: str | None = None, progress: Progress | None = None, verbose: bool = False
) -> Run:
    """Run every stage, or those up to and including `until`. A `dataset` of Ray Data, where there is one, is the source.

    Raises ConfigError for an unknown stage, a score that needs more epochs than the proxy has, and a package of `report.log_to` that is
    not installed, RunError when another driver
    holds the run, and what the stages raise. Where the scores are too unfaithful to prune by, the report is still written before the
    TrustError is raised.
    """
    if until is not None and until not in STAGE_FOLDERS:
        raise ConfigError(f"stage {until!r} is not one of {', '.join(STAGE_FOLDERS)}")
    check_scores(config)
    if config.report.log_to:
        from raypipe.report.trackers import check_trackers

        check_trackers(config.report.log_to)
    with errors_of_storage(config.run):
        return _execute(config, dataset, until, progress or Progress(verbose=verbose), verbose)


def _execute(config: Config, dataset: Any, until: str | None, progress: Progress, verbose: bool) -> Run:
    run, given = Run(config.run), config.source
    if dataset is not None:
        from raypipe.stages.dataset_copy import copy_dataset, settings_of_copy

        config = config.model_copy(update={"source": settings_of_copy(given, run)})
    else:  # what auto stands for is told once here, instead of by a listing in every task
        config = config.model_copy(update={"source": open_source(given).settled(config.proxy.image_size)})
    context = Context(config, run, progress, verbose)
    with Lease(run) as lease, log_file(run, verbose), closing(context):
        records = run.ledger() if run.exists() else {}
        lease.about = partial(_how_far, progress, records)
        if tables_of(records):
            raise RunError(f"{run.uri}: was made by `raypipe extrapolate`, from tables; give another folder")
        _check_noise(config, run, records)
        if dataset is not None:
            copy_dataset(dataset, given, context)
        run.write_config(config)
        names = STAGE_NAMES if until is None else STAGE_NAMES[: STAGE_NAMES.index(until) + 1]
        refusal: TrustError | None = None
        for name in names:
            stage = make_stage(name)
            if not stage.wanted(config):
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
    """Raise RunError rather than make a real run anew with labels that were replaced, or the other way round."""
    before, wanted = noise_of(records), noise_wanted(config.source)
    if "index" in records and records["index"].state == "done" and before != wanted:
        found = f"{before.share:g} with noise_seed {before.seed}" if before else "0"
        raise RunError(
            f"{run.uri}: was made with source.inject_noise {found}; a rehearsal with other labels takes a run folder of its own (`run`)"
        )


def extrapolate(
    config: Config, scores: str, column: str, *, progress: Progress | None = None, verbose: bool = False
) -> dict[str, Any]:
    """Score the embeddings in tables at `source.uri` from the scores of some of them, in `column` of tables at `scores`.

    Writes into the folder `run`; `raypipe.stages.own` says what. Returns its `summary.json`. Raises ConfigError for a method that
    cannot do this, SourceError for tables that cannot be used, RunError where the folder holds something else or is in use.
    """
    with errors_of_storage(config.run):
        return _extrapolate(config, scores, column, progress or Progress(verbose=verbose), verbose)


def _extrapolate(config: Config, scores: str, column: str, progress: Progress, verbose: bool) -> dict[str, Any]:
    run, uri = Run(config.run), config.source.uri
    method = config.extrapolate.method
    if method in MORE_THAN_TABLES:
        raise ConfigError(f"method {method} needs {MORE_THAN_TABLES[method]}; use another, such as gnn or knn-published")
    for given in (uri, scores):
        if (storage.filesystem(run.uri)[1] + "/").startswith(storage.filesystem(given)[1].rstrip("/") + "/"):
            raise ConfigError(f"{run.uri}: the output cannot be within {given}; give a folder elsewhere")
    there = storage.names(run.uri)
    ours = tables_of(run.ledger()) if "run.json" in there else there <= {"driver.json", "logs"}
    if not ours:
        raise RunError(f"{run.uri}: there is something else here, such as {min(there)}; give a new folder")
    from raypipe.stages.own import OwnStage

    stage, context = OwnStage(uri, scores, column), Context(config, run, progress, verbose)
    with Lease(run) as lease, log_file(run, verbose), closing(context):
        records = run.ledger() if run.exists() else {}
        lease.about = partial(_how_far, progress, records)
        advance(stage, context, records)
    return storage.read_json(run.path("summary.json"))


def advance(stage: Stage, context: Context, records: dict[str, StageRecord]) -> None:
    """Bring one stage to the state `done`."""
    run, name = context.run, stage.name
    needed = [records[need].fingerprint for need in stage.needs if need in records]  # a stage is not in every run
    wanted = fingerprint(name, stage.settings(context.config), needed)
    record = records.get(name)
    if record is not None and record.fingerprint != wanted:
        context.progress.say(f"{name:<11} {stage.changed}: made anew")
        stage.clear(context)
        record = None
    elif record is None:
        run.clear(name)  # what a run without a record of it left there cannot be trusted
    if record is not None and record.state == "done" and stage.complete(context, record):
        context.progress.say(f"{name:<11} done before: {record.samples:,} samples")
        return
    record = record or StageRecord(fingerprint=wanted, detail=dict(stage.detail))
    record.state, record.error, record.attempts = "running", "", record.attempts + 1
    records[name] = record
    run.write_ledger(records)
    started = time.monotonic()
    try:
        try:
            context.look_again()
            stage.execute(context, record)
        except KeyboardInterrupt:
            if run.lease is not None:
                run.lease.check()
            if context.starved:
                raise ResourceError(f"{name}: {context.starved}") from None
            raise
        except MemoryShortageError as error:
            less = f"Lower {LESS_MEMORY[name]}, or use" if name in LESS_MEMORY else "Use"
            raise MemoryShortageError(f"{name}: {error}. {less} machines with more memory; then run again to resume") from error
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
    context.progress.say(f"{name:<11} {record.samples:,} samples in {time.monotonic() - started:.1f} s")


def _how_far(progress: Progress, records: dict[str, StageRecord]) -> dict[str, Any]:
    """What `raypipe status` is told of a run under way, beyond its ledger."""
    seconds = {
        name: float(sum(getattr(item, name) for item in list(records.values()))) for name in ("cpu_seconds", "gpu_seconds")
    }
    return {**progress.about(), **seconds}


@contextmanager
def errors_of_storage(uri: str) -> Iterator[None]:
    """Storage that fails for good ends a run with one line that names it."""
    try:
        yield
    except RaypipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if getattr(error, "filename", None) else f"{uri}: "
        raise RaypipeError(f"{where}{error.strerror or error}. Mend it and run again to resume") from error


@contextmanager
def log_file(run: Run, verbose: bool = False) -> Iterator[None]:
    """Everything said goes to RUN/logs/<start>.log as well; with `verbose` a line for every fragment, too."""
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    uri = run.path("logs", now().replace(":", "") + ".log")
    handler.store = lambda text: storage.write_bytes(uri, text.encode())
    try:
        yield
    except BaseException as error:
        log.error("stopped: %s", error if isinstance(error, RaypipeError) else repr(error))
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError, RunError):  # what broke storage is told by what it broke
            handler.save()
        log.setLevel(level)


class _Lines(logging.Handler):
    """Keeps the last lines and stores them all again with every new one: object stores cannot append.

    Lines about fragments wait for the next other one, PAUSE seconds at most.
    """

    MOST, PAUSE = 5000, 10.0

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=self.MOST)
        self._stored, self._fresh = -math.inf, False
        self.store = lambda text: None

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
        self._fresh = True
        if record.levelno <= logging.DEBUG and time.monotonic() - self._stored < self.PAUSE:
            return
        with suppress(OSError, RunError):  # the stages report what is wrong with the storage, and who took the run over
            self.save()

    def save(self) -> None:
        """Store what has not been. Raises what storage does."""
        if self._fresh:
            self._stored, self._fresh = time.monotonic(), False
            self.store("\n".join(self._lines) + "\n")
