"""Extrapolate measured scores to tables of embeddings: no images, and no training of a proxy.

The folder has the layout of a run without the earlier stages, so that keep-lists are cut from it as
from any run::

    OUT/run.json        the ledger: one stage, with the tables it read
    OUT/config.yaml     settings of the extrapolation and of keep-lists
    OUT/index/          classes.json
    OUT/extrapolator/   checked.json, the result of the check of the tables; scored.parquet, the
                        scored samples; the rest as in a run
    OUT/scores/         one file per fragment of the embeddings, as in a run
    OUT/rejects/        every embedding that was left out, and why
    OUT/summary.json    counts, problems, fidelity

The tables are checked first (`validate`). Then the extrapolator is fitted and assessed, as in a run
without an audit set (`raypipe.stages.extrapolate.fit`). Finally every fragment of the embeddings is
read, scored and written in a Ray task. The file name derives from the fragment, so that an existing
file is not computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe._version import __version__
from raypipe.config import Config, ExtrapolateSettings
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import SourceError, StageError
from raypipe.runs.ledger import StageRecord, content_hash, now
from raypipe.runs.measured_scores import GIVEN_SCORES
from raypipe.runs.rejects import write_rejects
from raypipe.runs.run import Run
from raypipe.runs.score_shards import write_scores
from raypipe.runs.shards import count_rows
from raypipe.stages.base import Stage
from raypipe.stages.extrapolate.assess import is_assessed
from raypipe.stages.extrapolate.fidelity_file import FidelityFile, search_notes
from raypipe.stages.extrapolate.fit import fit_extrapolator
from raypipe.stages.extrapolate.model import load_extrapolator, load_intervals
from raypipe.tables.embeddings import read_batches, usable
from raypipe.tables.files import ID, LABEL, stored_files
from raypipe.tables.fragments import TableFragment, plan_embeddings
from raypipe.tables.problems import ProblemCounts
from raypipe.tables.scores import read_scores
from raypipe.tables.validate import check_tables, class_index

if TYPE_CHECKING:
    from raypipe.assessment.conformal import Conformal
    from raypipe.assessment.intervals import Intervals

CHECKED = "checked.json"
SECTIONS = {"run": True, "source": {"uri"}, "extrapolate": True, "trust": True, "select": True}
"""Settings that have a meaning for tables."""
IRRELEVANT = {
    "max_actors",
    "use_gpu",
    "score",
    "judge_published",
    "rehearsal",
    "audit_extremes",
}
"""Settings of `extrapolate` that scores from tables do not depend on."""


@dataclass(frozen=True)
class InputTables:
    """Where the tables are, as the ledger records it.

    Attributes
    ----------
    embeddings, scores : str
        File or folder.
    score_column : str
        Column of the scores.
    """

    embeddings: str
    scores: str
    score_column: str

    def as_json(self) -> dict[str, str]:
        """Return what the ledger records."""
        return dict(vars(self))


@dataclass(frozen=True)
class CheckedTables:
    """Result of the check of the tables, `extrapolator/checked.json`.

    Attributes
    ----------
    scored : int
        Samples with a score.
    measured : int
        Those of them with a usable embedding.
    width : int
        Width of a usable embedding.
    problems : dict
        See `ProblemCounts.as_dict`.
    """

    scored: int
    measured: int
    width: int
    problems: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, run: Run) -> CheckedTables:
        """Read the result of an earlier check."""
        return cls(**storage.read_json(run.checked_tables))

    def write(self, run: Run) -> None:
        """Write the result."""
        storage.write_json(run.checked_tables, vars(self))


class TableStage(Stage):
    """The only stage of a folder that `raypipe extrapolate` writes.

    Creating it reads the footers of all embeddings.

    Parameters
    ----------
    embeddings, scores, column : str
        See `InputTables`.

    Raises
    ------
    SourceError
        For tables that cannot be used.
    """

    name = "extrapolate"
    changed = "settings, scores or embeddings changed"

    def __init__(self, embeddings: str, scores: str, column: str) -> None:
        self._tables = InputTables(embeddings, scores, column)
        self.detail = {"tables": self._tables.as_json()}
        self._fragments = plan_embeddings(embeddings)
        self._stamps = [f"{file.path} {file.size} {file.stamp}" for _, file in stored_files(scores)]
        self._rows = sum(fragment.rows for fragment in self._fragments)

    def settings(self, config: Config) -> dict[str, Any]:
        content = {
            "pieces": content_hash(fragment.name for fragment in self._fragments),
            "stamps": content_hash(self._stamps),
        }
        return {**self._tables.as_json(), **content, **_relevant(config.extrapolate)}

    def clear(self, context: Context) -> None:
        for output in ("extrapolator", "scores", "rejects", "keep", "index", "summary.json"):
            storage.delete(context.run.path(output))

    def complete(self, context: Context, record: StageRecord) -> bool:
        return (
            self._is_fitted(context)
            and not self._missing(context.run)
            and "summary.json" in storage.names(context.run.uri)
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        run, progress = context.run, context.progress
        run.write_config(context.config, SECTIONS)
        if CHECKED not in storage.names(run.extrapolator_folder):
            self._check(context)
        checked = CheckedTables.read(run)
        for line in ProblemCounts(checked.problems).lines():
            progress.say(f"problem     {line}")
        if not self._is_fitted(context):
            record.cpu_seconds += fit_extrapolator(context, [], self._rows)
        for note in search_notes(FidelityFile.read(run).search, run.classes().names):
            progress.say(f"note: {note}")
        self._score(context, record, checked.width)
        self._finish(context, record, checked)

    def _is_fitted(self, context: Context) -> bool:
        existing = storage.names(context.run.extrapolator_folder)
        files = {CHECKED, GIVEN_SCORES, "model.json", "model.safetensors", "curve.json"}
        return files <= existing and is_assessed(context.config, context.run)

    def _missing(self, run: Run) -> list[TableFragment]:
        done = run.done("scores")
        return [fragment for fragment in self._fragments if fragment.name not in done]

    def _check(self, context: Context) -> None:
        """Check the tables, and write what the fit needs of them."""
        from raypipe.extrapolators import make

        run, settings, problems = context.run, context.config.extrapolate, ProblemCounts()
        scores = read_scores(self._tables.scores, self._tables.score_column, problems)
        scored, classes = check_tables(
            self._fragments, scores, problems, context.progress, context.run_tasks
        )
        required = max(2, make(settings, len(classes.names)).min_samples)
        if len(scored) < required:
            raise SourceError(
                f"{len(scored)} scored samples have a usable embedding, but method "
                f"{settings.method} needs {required}; score more samples, "
                "or use method knn-published"
            )
        storage.write_json(run.classes_file, {"names": classes.names, "numeric": classes.numeric})
        storage.write_table(run.given_scores, scored, dictionary=False)
        CheckedTables(
            scored=len(scores),
            measured=len(scored),
            width=scored.schema.field("embedding").type.list_size,
            problems=problems.as_dict(),
        ).write(run)

    def _score(self, context: Context, record: StageRecord, width: int) -> None:
        """Score the fragments that have no score shard yet."""
        missing = self._missing(context.run)
        with context.progress.meter("extrapolate", self._rows) as meter:
            meter.already(self._rows - sum(fragment.rows for fragment in missing))

            def collect(result: ScoredFragment) -> None:
                meter.add(result.rows)
                record.cpu_seconds += result.cpu_seconds

            if missing:
                task = ScoringTask(context.run.uri, record.fingerprint, width)
                context.run_tasks(missing, functools.partial(score_fragment, task), collect)

    def _finish(self, context: Context, record: StageRecord, checked: CheckedTables) -> None:
        """Check that every embedding has a score or a reject, and write the summary."""
        run, settings = context.run, context.config.extrapolate
        left_out = _rejected(run)
        for line in left_out.lines():
            context.progress.say(f"problem     {line}")
        samples, rejects = count_rows(run, "scores"), count_rows(run, "rejects")
        if samples + rejects != self._rows:
            raise StageError(
                f"{self._rows} embeddings, but {samples} scores and {rejects} left out; "
                "a file changed while it was read. Rerun the command"
            )
        assessment, classes = FidelityFile.read(run), run.classes()
        curve = storage.read_json(run.learning_curve_file)
        fidelity = _in_terms_of_tables(assessment.fidelity)
        if not classes.names:
            # without classes, the mean of a class is the same number for all samples
            fidelity["baselines"].pop("class_mean", None)
        record.samples = samples
        record.detail = {
            **self.detail,
            "method": settings.method,
            "score": self._tables.score_column,
            "measured": checked.measured,
            "fidelity": fidelity,
            "learning_curve": _in_terms_of_tables(curve),
        }
        summary = {
            "raypipe": __version__,
            "finished": now(),
            **record.detail,
            "counts": {
                "embeddings": self._rows,
                "samples": samples,
                "left_out": rejects,
                "scored": checked.scored,
                "measured": checked.measured,
                "extrapolated": samples - checked.measured,
            },
            "width": checked.width,
            "classes": len(classes.names),
            "intervals": assessment.intervals,
            "neighbour_search": assessment.search,
            "problems": {**checked.problems, **left_out.as_dict()},
            "settings": _relevant(settings),
            "cpu_seconds": record.cpu_seconds,
        }
        storage.write_json(run.table_summary, summary)


def _rejected(run: Run) -> ProblemCounts:
    """Count the rejects by kind of problem."""
    problems = ProblemCounts()
    for _, table in storage.iter_tables(run.rejects_folder, threads=storage.READERS):
        ids, reasons = table[ID].to_pylist(), table["reason"].to_pylist()
        for sample_id, reason in zip(ids, reasons, strict=True):
            problems.add(reason.partition(":")[0], [sample_id])
    return problems


def _relevant(settings: ExtrapolateSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=IRRELEVANT)


def _in_terms_of_tables(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures of a run in the terms of tables.

    The held-out samples are not a seed set, and what the notes recommend has other names.
    """
    note = (
        figures["note"]
        .replace("seed.fraction", "the number of scored samples")
        .replace("extrapolate.holdout", "holdout")
    )
    return {**figures, "judged_on": "scored", "note": note}


# -- tasks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoringTask:
    """What a task needs in addition to its fragment.

    Attributes
    ----------
    run_uri, fingerprint : str
        The output folder, and the fingerprint of the fitted extrapolator in it.
    width : int
        Width of a usable embedding.
    """

    run_uri: str
    fingerprint: str
    width: int


@dataclass(frozen=True)
class ScoredFragment:
    """Size and cost of a scored fragment."""

    rows: int
    cpu_seconds: float


@functools.lru_cache(maxsize=1)
def _loaded(run_uri: str, _fingerprint: str) -> tuple[Any, Intervals | Conformal, dict[str, float]]:
    """Load extrapolator, intervals and the given scores by id, once per process."""
    run = Run(run_uri)
    table = storage.read_table(run.given_scores, [ID, "score"])
    scores = dict(zip(table[ID].to_pylist(), table["score"].to_pylist(), strict=True))
    return load_extrapolator(run.config(), run), load_intervals(run), scores


def score_fragment(task: ScoringTask, fragment: TableFragment) -> ScoredFragment:
    """Write scores and rejects of one fragment. Runs in a task."""
    from raypipe.extrapolators.base import Nodes
    from raypipe.vision.devices import set_threads

    watch, run = Stopwatch(), Run(task.run_uri)
    set_threads(1)
    extrapolator, intervals, scores = _loaded(task.run_uri, task.fingerprint)
    classes = run.classes()
    rejects: list[tuple[str, str]] = []
    tables: list[pa.Table] = []
    predicted, half_width = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for batch in read_batches(fragment):
        reasons, embedding = usable(batch, task.width)
        names = batch.names(fragment.path)
        rejects += [(name, reason) for name, reason in zip(names, reasons, strict=True) if reason]
        is_usable = pa.array([not reason for reason in reasons])
        label = class_index(batch.label.filter(is_usable), classes)
        nodes = Nodes(embedding, label, np.zeros((len(label), 0), np.float32))
        if len(nodes):
            values, doubt = extrapolator.predict_with_doubt(nodes)
            predicted.append(values)
            half_width.append(intervals.around(values, doubt, label))
        labels = pa.array(label, pa.int32(), mask=label < 0)
        tables.append(pa.table({ID: batch.ids.filter(is_usable), LABEL: labels}))
    if rejects:
        write_rejects(run, fragment.name, rejects)
    write_scores(
        run,
        fragment.name,
        pa.concat_tables(tables),
        np.concatenate(predicted),
        np.concatenate(half_width),
        scores,
    )
    return ScoredFragment(fragment.rows, watch.lap())
