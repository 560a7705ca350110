"""Extrapolates a score that somebody measured over embeddings that somebody made: no images, no proxy, no training of one.

The folder is laid out as a run without the stages before, so that keep-lists are cut from it as from any run:

    OUT/run.json        the ledger: one stage, with what it was made from
    OUT/config.yaml     settings of the extrapolation and of keep-lists
    OUT/index/          classes.json
    OUT/extrapolator/   checked.json, what was found in the tables; scored.parquet, the scored samples; the rest as in a run
    OUT/scores/         one file per piece of the embeddings, as in a run
    OUT/rejects/        every embedding that was left out, and why
    OUT/summary.json    counts, problems, fidelity

The tables are looked through first (`own_check`), then the extrapolator is fitted and judged as that of a run without an audit set
is (`fitting`), then every piece of the embeddings is read, scored and written on its own, in a Ray task, under a name made from the
piece: what is there is not done again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

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
from raypipe.stages.extrapolate.assess import is_assessed, load_extrapolator, load_intervals
from raypipe.stages.extrapolate.fit import fit_extrapolator
from raypipe.stages.extrapolate.stage import search_notes
from raypipe.tables.reader import (
    ID,
    LABEL,
    Piece,
    ProblemTally,
    plan_embeddings,
    read_batches,
    read_scores,
    stored_files,
    usable,
)
from raypipe.tables.validate import check, class_index

CHECKED = "checked.json"
SECTIONS = {"run": True, "source": {"uri"}, "extrapolate": True, "trust": True, "select": True}
"""Settings that mean something here."""


class TableStage(Stage):
    """The only stage of such a folder."""

    name = "extrapolate"
    changed = "settings, scores or embeddings changed"

    def __init__(self, embeddings: str, scores: str, column: str) -> None:
        """Reads the footers of all embeddings. Raises SourceError for tables that cannot be used."""
        self.tables = {"embeddings": embeddings, "scores": scores, "score_column": column}
        self.detail = {"tables": self.tables}
        self._pieces = plan_embeddings(embeddings)
        self._stamps = [f"{file.path} {file.size} {file.stamp}" for _, file in stored_files(scores)]
        self._rows = sum(piece.rows for piece in self._pieces)

    def settings(self, config: Config) -> dict[str, Any]:
        content = {
            "pieces": content_hash(piece.name for piece in self._pieces),
            "stamps": content_hash(self._stamps),
        }
        return {**self.tables, **content, **_chosen(config.extrapolate)}

    def clear(self, context: Context) -> None:
        for what in ("extrapolator", "scores", "rejects", "keep", "index", "summary.json"):
            storage.delete(context.run.path(what))

    def complete(self, context: Context, record: StageRecord) -> bool:
        return (
            self._learned(context)
            and not self._missing(context.run)
            and "summary.json" in storage.names(context.run.uri)
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        run, progress = context.run, context.progress
        run.write_config(context.config, SECTIONS)
        if CHECKED not in storage.names(run.extrapolator_folder):
            self._check(context)
        checked = storage.read_json(run.checked_tables)
        for line in ProblemTally(checked["problems"]).lines():
            progress.say(f"problem     {line}")
        if not self._learned(context):
            record.cpu_seconds += fit_extrapolator(context, [], self._rows)
        search = storage.read_json(run.fidelity_file)["search"]
        for note in search_notes(search, run.classes().names):
            progress.say(f"note: {note}")
        missing = self._missing(run)
        with progress.meter("extrapolate", self._rows) as meter:
            meter.already(self._rows - sum(piece.rows for piece in missing))

            def collect(result: dict[str, Any]) -> None:
                meter.add(result["rows"])
                record.cpu_seconds += result["cpu_seconds"]

            if missing:
                context.run_tasks(
                    missing,
                    functools.partial(
                        score_piece, PieceJob(run.uri, record.fingerprint, checked["width"])
                    ),
                    collect,
                )
        self._finish(context, record, checked)

    def _learned(self, context: Context) -> bool:
        there = storage.names(context.run.extrapolator_folder)
        files = {CHECKED, GIVEN_SCORES, "model.json", "model.safetensors", "curve.json"}
        return files <= there and is_assessed(context.config, context.run)

    def _missing(self, run: Run) -> list[Piece]:
        done = run.done("scores")
        return [piece for piece in self._pieces if piece.name not in done]

    def _check(self, context: Context) -> None:
        """Look through the tables, and write down what the fit needs of them."""
        from raypipe.extrapolators import make

        run, settings, tally = context.run, context.config.extrapolate, ProblemTally()
        scores = read_scores(self.tables["scores"], self.tables["score_column"], tally)
        scored, classes = check(self._pieces, scores, tally, context.progress, context.run_tasks)
        fewest = max(2, make(settings, len(classes.names)).min_samples)
        if len(scored) < fewest:
            raise SourceError(
                f"{len(scored)} scored samples have a usable embedding, but method {settings.method} needs {fewest}; score more "
                "samples, or use method knn-published"
            )
        storage.write_json(run.classes_file, {"names": classes.names, "numeric": classes.numeric})
        storage.write_table(run.given_scores, scored, dictionary=False)
        found = {
            "scored": len(scores),
            "measured": len(scored),
            "width": scored.schema.field("embedding").type.list_size,
        }
        storage.write_json(run.checked_tables, {**found, "problems": tally.as_dict()})

    def _finish(self, context: Context, record: StageRecord, checked: dict[str, Any]) -> None:
        """Check the sums, and write the summary."""
        run, settings = context.run, context.config.extrapolate
        left_out = ProblemTally()
        for _, table in storage.iter_tables(run.rejects_folder, threads=storage.READERS):
            for sample_id, reason in zip(
                table[ID].to_pylist(), table["reason"].to_pylist(), strict=True
            ):
                left_out.add(reason.partition(":")[0], [sample_id])
        for line in left_out.lines():
            context.progress.say(f"problem     {line}")
        samples, rejects = count_rows(run, "scores"), count_rows(run, "rejects")
        if samples + rejects != self._rows:
            raise StageError(
                f"{self._rows} embeddings, but {samples} scores and {rejects} left out; a file changed while it was read. Run again"
            )
        judged, classes = (
            storage.read_json(run.fidelity_file),
            run.classes(),
        )
        curve = storage.read_json(run.learning_curve_file)
        fidelity = _in_words_of_tables(judged["fidelity"])
        if not classes.names:
            fidelity["baselines"].pop(
                "class_mean", None
            )  # without classes it is one number for all
        record.samples = samples
        record.detail = {
            **self.detail,
            "method": settings.method,
            "score": self.tables["score_column"],
            "measured": checked["measured"],
            "fidelity": fidelity,
            "learning_curve": _in_words_of_tables(curve),
        }
        counts = {
            "embeddings": self._rows,
            "samples": samples,
            "left_out": rejects,
            "scored": checked["scored"],
        }
        summary = {
            "raypipe": __version__,
            "finished": now(),
            **record.detail,
            "counts": {
                **counts,
                "measured": checked["measured"],
                "extrapolated": samples - checked["measured"],
            },
            "width": checked["width"],
            "classes": len(classes.names),
            "intervals": judged["intervals"],
            "neighbour_search": judged["search"],
            "problems": {**checked["problems"], **left_out.as_dict()},
            "settings": _chosen(settings),
            "cpu_seconds": record.cpu_seconds,
        }
        storage.write_json(run.table_summary, summary)


def _chosen(settings: ExtrapolateSettings) -> dict[str, Any]:
    return settings.model_dump(
        mode="json", exclude={"max_actors", "use_gpu", "score", "judge_published", "rehearsal"}
    )


def _in_words_of_tables(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as a run has them; but here the samples that were held out are no seed set, and what its notes advise has other names."""
    note = (
        figures["note"]
        .replace("seed.fraction", "the number of scored samples")
        .replace("extrapolate.holdout", "holdout")
    )
    return {**figures, "judged_on": "scored", "note": note}


@dataclass(frozen=True)
class PieceJob:
    """What a task needs beside its piece. width: that of a usable embedding."""

    run_uri: str
    fingerprint: str
    width: int


@functools.lru_cache(maxsize=1)
def _loaded(run_uri: str, _fingerprint: str) -> tuple[Any, Any, dict[str, float]]:
    """The fitted extrapolator, its intervals, and the scores by id, once a process."""
    run = Run(run_uri)
    table = storage.read_table(run.given_scores, [ID, "score"])
    scores = dict(zip(table[ID].to_pylist(), table["score"].to_pylist(), strict=True))
    return load_extrapolator(run.config(), run), load_intervals(run), scores


def score_piece(job: PieceJob, piece: Piece) -> dict[str, Any]:
    """Write the scores of one piece, and what was left out of it. Runs in a task."""
    from raypipe.extrapolators.base import Nodes
    from raypipe.vision.devices import set_threads

    watch, run = Stopwatch(), Run(job.run_uri)
    set_threads(1)
    extrapolator, intervals, scores = _loaded(job.run_uri, job.fingerprint)
    classes = run.classes()
    rejects: list[tuple[str, str]] = []
    tables, predicted, half_width = (
        list[pa.Table](),
        [np.zeros(0, np.float32)],
        [np.zeros(0, np.float32)],
    )
    for batch in read_batches(piece):
        reason, embedding = usable(batch, job.width)
        good = pa.array([not text for text in reason])
        rejects += [
            (name, text) for name, text in zip(batch.names(piece.path), reason, strict=True) if text
        ]
        label = class_index(batch.label.filter(good), classes)
        nodes = Nodes(embedding, label, np.zeros((len(label), 0), np.float32))
        if len(nodes):
            scored, difficulty = extrapolator.predict_with_difficulty(nodes)
            predicted.append(scored)
            half_width.append(intervals.half_width(difficulty, label))
        tables.append(
            pa.table(
                {ID: batch.ids.filter(good), LABEL: pa.array(label, pa.int32(), mask=label < 0)}
            )
        )
    if rejects:
        write_rejects(run, piece.name, rejects)
    write_scores(
        run,
        piece.name,
        pa.concat_tables(tables),
        np.concatenate(predicted),
        np.concatenate(half_width),
        scores,
    )
    return {"unit": piece.name, "rows": piece.rows, "cpu_seconds": watch.lap()}
