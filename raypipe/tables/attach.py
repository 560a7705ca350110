"""`raypipe attach`: give scores that were extrapolated from tables their images.

The result is a run over the images, in a folder of its own: the index of the images, and one score
shard per fragment. Report, evaluation and export then work as for any run. Scores and images are
matched by id; whatever has no counterpart is counted and named.

Every worker holds the scores of all samples, about 100 bytes each, and reads each image once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.config import Config, SourceSettings
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import ConfigError, RunError, SourceError
from raypipe.pipeline import advance, driver_progress
from raypipe.progress import Progress
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import TABLE_SECTIONS, StageRecord, without_images
from raypipe.runs.log_file import log_file
from raypipe.runs.rejects import write_rejects
from raypipe.runs.run import Run
from raypipe.runs.score_shards import SCORE_SCHEMA
from raypipe.runs.shards import count_rows, remove_stale
from raypipe.selection import hash64
from raypipe.sources import Fragment, open_source
from raypipe.sources.classes import MatchedClasses, match_classes
from raypipe.sources.used_settings import refuse_unused_settings
from raypipe.stages.base import Stage
from raypipe.stages.extrapolate.fidelity_file import FidelityFile
from raypipe.stages.index.stage import IndexStage
from raypipe.text import counted

ATTACHED = "attached.json"
"""File of the run folder that names the folder of the scores."""
WITHOUT_IMAGE = "without_image.parquet"
"""File of the run folder with the scored ids that no image has."""
NO_SCORE = "no score: its id is not in the tables"
"""Reject reason of an image without a score."""
SHOWN_IDS = 3
"""Ids that a message names."""


def attach(
    tables: Run, config: Config, *, progress: Progress | None = None, verbose: bool = False
) -> dict[str, Any]:
    """Write a run over images with the scores of a folder of `raypipe extrapolate`, or resume it.

    Parameters
    ----------
    tables : Run
        The folder of `raypipe extrapolate`.
    config : Config
        `run` is the folder to write, and `source` the images.

    Returns
    -------
    dict
        See `AttachedCounts`.

    Raises
    ------
    RunError
        If there are no such scores, or the folder to write holds something else.
    SourceError
        If no id of a score is the id of an image, or the classes of both cannot be matched.
    """
    with storage.errors_of_storage(config.run):
        return _attach(tables, config, progress or Progress(verbose=verbose), verbose)


def _attach(tables: Run, config: Config, progress: Progress, verbose: bool) -> dict[str, Any]:
    run = Run(config.run)
    if not without_images(tables.ledger()):
        raise RunError(
            f"{tables.uri}: not written by `raypipe extrapolate`; give the folder of its --out"
        )
    record = tables.record("extrapolate")
    if config.source.label_column is None:
        raise ConfigError(
            "source.label_column: null has no effect here; images without labels have those of "
            "the tables"
        )
    _check_folder(run, tables)
    opened = open_source(config.source)
    refuse_unused_settings(config.source, opened.format)
    source = opened.resolved_settings(config.proxy.image_size)
    config = config.model_copy(update={"source": source})
    context = Context(config, run, progress, verbose)
    with Lease(run) as lease, log_file(run, verbose), closing(context):
        records = run.ledger() if run.exists() else {}
        lease.about = partial(driver_progress, progress, records)
        run.write_config(config, dict.fromkeys(TABLE_SECTIONS, True))
        advance(IndexStage(), context, records)
        advance(AttachStage(tables, record), context, records)
    return records["extrapolate"].detail["attached"]


def _check_folder(run: Run, tables: Run) -> None:
    """Raise RunError unless the folder is new, or holds the same run. Marks a new one."""
    files = storage.names(run.uri)
    marker, about = run.path(ATTACHED), {"tables": tables.uri}
    if ATTACHED in files:
        usable = storage.read_json(marker) == about
    else:
        usable = files <= {"driver.json", "logs"}
    if not usable:
        raise RunError(
            f"{run.uri}: the folder holds something else, such as {min(files)}; choose a new folder"
        )
    storage.write_json(marker, about)


class AttachStage(Stage):
    """The stage `extrapolate` of a run over images whose scores come from tables.

    Parameters
    ----------
    tables : Run
        The folder of `raypipe extrapolate`.
    record : StageRecord
        The stage `extrapolate` of that folder.
    """

    name = "extrapolate"
    needs = ("index",)
    changed = "images or scores changed"

    def __init__(self, tables: Run, record: StageRecord) -> None:
        self._tables, self._record = tables, record

    def settings(self, config: Config) -> dict[str, Any]:
        return {"tables": self._tables.uri, "scores": self._record.fingerprint}

    def clear(self, context: Context) -> None:
        for output in ("extrapolator", "scores", "rejects", "keep", WITHOUT_IMAGE):
            storage.delete(context.run.path(output))

    def complete(self, context: Context, record: StageRecord) -> bool:
        of_index = record.detail.get("listing") == _listing(context.run)
        return of_index and not self._missing(context.run)

    def execute(self, context: Context, record: StageRecord) -> None:
        run, tables = context.run, self._tables
        if not run.classes().names:  # images without labels have those of the tables
            storage.write_bytes(run.classes_file, storage.read_bytes(tables.classes_file))
        job = AttachJob(run.uri, tables.uri, self._record.fingerprint, context.config.source)
        classes_of_tables(job)  # if they cannot be matched, it ends here and not in every task
        fragments = [fragment for fragment in run.fragments() if not fragment.error]
        remove_stale(run, fragments, ("scores", "rejects"))
        missing, others = self._missing(run), 0
        total = sum(fragment.samples for fragment in fragments)
        with context.progress.meter("attach", total) as meter:
            meter.already(total - sum(fragment.samples for fragment in missing))

            def collect(result: MatchedFragment) -> None:
                nonlocal others
                others += result.other_label
                meter.add(result.samples)
                record.cpu_seconds += result.cpu_seconds

            context.run_tasks(missing, functools.partial(match_fragment, job), collect)
        if others:
            context.progress.say(
                f"note: {counted(others, 'image')} of another class than in the tables; those of "
                "the images are used. Check that equal ids mean equal images"
            )
        assessed = {**self._record.detail, "search": FidelityFile.read(tables).search}
        storage.write_json(run.extrapolator_summary, assessed)
        counts = _count(run, tables, total)
        for line in counts.lines(run):
            context.progress.say(f"note: {line}")
        record.samples = counts.matched
        record.detail = {
            **self._record.detail,
            "measured": counts.measured,
            "attached": dataclasses.asdict(counts),
            "listing": _listing(run),
        }

    def _missing(self, run: Run) -> list[Fragment]:
        done = run.done("scores")
        return [
            fragment
            for fragment in run.fragments()
            if not fragment.error and fragment.fragment_id not in done
        ]


def _listing(run: Run) -> Any:
    """Return a hash of the images that the index lists."""
    return run.ledger()["index"].detail["listing"]


@dataclass(frozen=True)
class AttachedCounts:
    """How scores and images were matched, in samples.

    Attributes
    ----------
    images : int
        Images of the source.
    matched : int
        Images with a score.
    measured : int
        Those whose score was given.
    rejected : int
        Images without a score, or that cannot be read.
    without_image : int
        Scores whose id no image has, or only one that cannot be read.
    examples : list of str
        Some ids of these.
    """

    images: int
    matched: int
    measured: int
    rejected: int
    without_image: int
    examples: list[str]

    def lines(self, run: Run) -> Iterator[str]:
        """Yield a line for each kind of samples without a counterpart."""
        if self.rejected:
            yield (
                f"{self.rejected:,} of {counted(self.images, 'image')} have no score or cannot be "
                f"read; {run.rejects_folder} has the reason of each"
            )
        if self.without_image:
            yield (
                f"{counted(self.without_image, 'score')} without an image, such as "
                f"{', '.join(map(repr, self.examples))}; {run.path(WITHOUT_IMAGE)} lists all"
            )


def _count(run: Run, tables: Run, images: int) -> AttachedCounts:
    """Count what was matched, and list the scores without an image.

    Raises
    ------
    SourceError
        If nothing was matched.
    """
    found, measured = [np.zeros(0, np.uint64)], 0
    for _, shard in storage.iter_tables(run.scores_folder, ["sample_id", "measured"]):
        found.append(hash64(shard["sample_id"]))
        measured += pc.sum(shard["measured"]).as_py() or 0
    matched = np.sort(np.concatenate(found))
    parts = [pa.array([], pa.string())]
    for _, shard in storage.iter_tables(tables.scores_folder, ["sample_id"]):
        ids = shard["sample_id"].combine_chunks()
        parts.append(ids.filter(pa.array(~np.isin(hash64(ids), matched))))
    absent = pa.concat_arrays(parts)
    examples = absent.slice(0, SHOWN_IDS).to_pylist()
    if not len(matched):
        ids = storage.read_table(run.reject_shard(min(run.done("rejects"))), ["sample_id"])
        run.clear("extrapolate")
        raise SourceError(
            f"none of {counted(images, 'image')} has the id of a score: images have ids such as "
            f"{ids['sample_id'][0].as_py()!r}, scores such as {examples[0]!r}; set source.uri or "
            "source.id_column so that they agree"
        )
    if len(absent):
        storage.write_table(run.path(WITHOUT_IMAGE), pa.table({"sample_id": absent}))
    else:
        storage.delete(run.path(WITHOUT_IMAGE))
    rejected = count_rows(run, "rejects")
    return AttachedCounts(images, len(matched), measured, rejected, len(absent), examples)


# -- tasks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttachJob:
    """What a task needs in addition to its fragment.

    Attributes
    ----------
    run_uri, tables_uri : str
        The run over images, and the folder of `raypipe extrapolate`.
    fingerprint : str
        Identifies the scores.
    source : SourceSettings
        The images.
    """

    run_uri: str
    tables_uri: str
    fingerprint: str
    source: SourceSettings


@dataclass(frozen=True)
class MatchedFragment:
    """Samples of a matched fragment, those with another label in the tables, and the cost."""

    samples: int
    other_label: int
    cpu_seconds: float


@functools.lru_cache(maxsize=1)
def _scores(tables_uri: str, _fingerprint: str) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Return ascending hashes of the ids, the row of each, and all score shards as one table."""
    shards = [table for _, table in storage.iter_tables(Run(tables_uri).scores_folder)]
    table = pa.concat_tables(shards).select(SCORE_SCHEMA.names).combine_chunks()
    hashes = hash64(table["sample_id"].combine_chunks())
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order, table


def rows_of(
    ids: Sequence[str], hashes: np.ndarray, order: np.ndarray, known: pa.Array
) -> list[int]:
    """Return the row of each id among those known, -1 for an unknown one."""
    requested = hash64(pa.array(ids, pa.string()))
    first = np.searchsorted(hashes, requested, "left")
    last = np.searchsorted(hashes, requested, "right")
    return [
        next((int(row) for row in order[start:stop] if known[row].as_py() == name), -1)
        for name, start, stop in zip(ids, first.tolist(), last.tolist(), strict=True)
    ]


def classes_of_tables(job: AttachJob) -> MatchedClasses:
    """Return the classes of the tables as classes of the images.

    Raises
    ------
    SourceError
        If the images have other classes.
    """
    try:
        return match_classes(Run(job.run_uri).classes(), Run(job.tables_uri).classes())
    except SourceError as error:
        raise SourceError(
            f"{job.source.uri}: the labels of the tables do not fit those of the images: {error}. "
            "Use the same names of classes in both, or tables without labels"
        ) from None


def match_fragment(job: AttachJob, fragment: Fragment) -> MatchedFragment:
    """Write scores and rejects of one fragment of the images. Runs in a task."""
    watch, run, source = Stopwatch(), Run(job.run_uri), open_source(job.source)
    hashes, order, table = _scores(job.tables_uri, job.fingerprint)
    samples = list(
        reject_duplicates(
            run, fragment, source.read(run.with_members(fragment)), source.ids_can_repeat
        )
    )
    rows = rows_of([sample.sample_id for sample in samples], hashes, order, table["sample_id"])
    classes, of_tables = run.classes(), classes_of_tables(job)
    scored: list[int] = []
    labels: list[int] = []
    rejects: list[tuple[str, str]] = []
    others = 0
    for sample, row in zip(samples, rows, strict=True):
        label, problem = classes.label_of(sample)
        reason = sample.reason or problem or (NO_SCORE if row < 0 else "")
        if reason:
            rejects.append((sample.sample_id, reason))
            continue
        stated = table["label"][row].as_py()
        of_table = -1 if stated is None else of_tables.places[stated]
        others += label >= 0 and of_table >= 0 and label != of_table
        scored.append(row)
        labels.append(label if label >= 0 else of_table)
    if rejects:
        write_rejects(run, fragment.fragment_id, rejects)
    else:
        storage.delete(run.reject_shard(fragment.fragment_id))
    label_column = pa.array(labels, pa.int32(), mask=np.array(labels, np.int64) < 0)
    shard = table.take(pa.array(scored, pa.int64()))
    shard = shard.set_column(shard.column_names.index("label"), "label", label_column)
    storage.write_table(run.score_shard(fragment.fragment_id), shard.cast(SCORE_SCHEMA))
    return MatchedFragment(len(samples), others, watch.lap())
