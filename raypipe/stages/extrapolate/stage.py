"""Extrapolate: fit the extrapolator on the seed set, assess it, and predict all other scores.

Writes under `extrapolator/` the fitted model, the predictions that it is assessed by (see
`raypipe.stages.extrapolate.assess`) and `extrapolator.json` (method, fidelity, learning curve,
intervals), and for each fragment `scores/<fragment>.parquet`.

A sample's neighbours are searched among the scored samples, so fragments are independent of one
another. The exception is `gnn-published`, whose graph spans the whole source and is held by one
task. A sample of the audit set gets its measured score, which is better than the predicted one,
after the two were compared for the fidelity.

Then some samples with extreme predictions are measured as well, and the assessment is repeated with
them; see `raypipe.stages.extrapolate.extremes`.

With cross-fitting there is an extrapolator to the samples of each part
(`raypipe.runs.proxy_roles`), and all scores are predicted: a measured score would mean something
else than a predicted one. It is written next to it.

With `proxy.repeats`, an extrapolator sees the embeddings by one proxy of each repeat side by side.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config, ExtrapolateSettings, PoolSettings
from raypipe.config.extrapolate import SEARCHERS_PER_GPU
from raypipe.distributed.actor_pool import Batch, WorkerContext, stream
from raypipe.distributed.cluster import ActorPool, Cluster
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.runs.ledger import StageRecord
from raypipe.runs.measured_scores import every_measured_score
from raypipe.runs.score_shards import write_scores
from raypipe.runs.shards import count_rows, remove_stale
from raypipe.runs.unit_result import UnitResult
from raypipe.sources import Fragment
from raypipe.stages.base import Stage
from raypipe.stages.extrapolate.assess import is_assessed
from raypipe.stages.extrapolate.extremes import audit_extremes, is_audited, remove_audit
from raypipe.stages.extrapolate.fidelity_file import FidelityFile, search_notes
from raypipe.stages.extrapolate.fit import fit_extrapolator
from raypipe.stages.extrapolate.measured import read_samples
from raypipe.stages.extrapolate.model import (
    TRANSFER,
    WHOLE_METHODS,
    load_extrapolator,
    load_intervals,
    model_files,
)
from raypipe.stages.extrapolate.probe import ProbeActor, read_viewed

UNITS_PER_ACTOR = 16
"""Fragments of a thousand samples whose scoring takes as long as an actor's import of torch."""


class ExtrapolateStage(Stage):
    """Predict the score of every sample that has no measured one."""

    name = "extrapolate"
    needs = ("measure", "embed")

    def settings(self, config: Config) -> dict[str, Any]:
        # another audit changes the assessment, but no score
        settings = config.extrapolate.model_dump(
            mode="json", exclude={"options", "max_actors", "use_gpu", "audit_extremes"}
        )
        cross_fit = {"cross_fit": True} if config.proxy.cross_fits else {}
        return {**settings, "rehearsal": config.rehearses, "score": config.score, **cross_fit}

    def complete(self, context: Context, record: StageRecord) -> bool:
        run = context.run
        files = {"extrapolator.json"} | model_files(context.config, run)
        if context.config.rehearses:
            files.add(TRANSFER)
        return (
            files <= storage.names(run.extrapolator_folder)
            and is_assessed(context.config, run)
            and is_audited(context.config, record)
            and run.done("scores") == run.done("embeddings")
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        fragments = [fragment for fragment in run.fragments() if not fragment.error]
        remove_stale(run, fragments, ("scores",))
        done = run.done("scores")
        missing = [
            fragment.fragment_id for fragment in fragments if fragment.fragment_id not in done
        ]
        pool = _pool(context.cluster, config.extrapolate)
        samples = sum(fragment.samples for fragment in fragments)
        if not is_audited(config, record):
            remove_audit(run)
        record.cpu_seconds += fit_extrapolator(context, missing, samples)
        assessment = FidelityFile.read(run)
        for note in search_notes(assessment.search, run.classes().names):
            context.progress.say(f"note: {note}")
        if config.extrapolate.use_gpu and assessment.search["kind"] != "exact":
            pool = _pool(context.cluster, config.extrapolate, exact=False)
            context.progress.say(
                "note: extrapolate.use_gpu has no effect: more samples have a measured score than "
                "extrapolate.exact_neighbours, so CPUs search inverted lists"
            )
        if config.extrapolate.method in WHOLE_METHODS:
            missing = []  # the fit has scored them
        _score_fragments(context, record, fragments, missing, pool)
        scored, embedded = count_rows(run, "scores"), count_rows(run, "embeddings")
        if scored != embedded:
            raise StageError(
                f"{embedded} samples are embedded, but {scored} have a score; "
                "run again to score the rest"
            )
        audit_extremes(context, record, fragments)
        assessment = FidelityFile.read(run)
        record.samples = scored
        record.detail = {
            "method": config.extrapolate.method,
            "score": config.score,
            "measured": assessment.measured,
            "fidelity": assessment.fidelity,
            "fidelity_seed": assessment.fidelity_seed,
            **({"stability": assessment.stability} if assessment.stability else {}),
            **_audit_setting(config),
            "search": assessment.search,
            "learning_curve": storage.read_json(run.learning_curve_file),
        }
        summary = {
            **record.detail,
            "confidence": config.extrapolate.confidence,
            "intervals": assessment.intervals,
        }
        file = run.extrapolator_summary
        if not storage.exists(file) or storage.read_json(file) != summary:
            storage.write_json(file, summary)


def _audit_setting(config: Config) -> dict[str, Any]:
    """Return the setting of the audit of extremes, as the ledger records it for `is_audited`."""
    if config.score not in config.measure.at_checkpoints:
        return {}
    return {"audit_extremes": config.extrapolate.audit_extremes}


def _score_fragments(
    context: Context,
    record: StageRecord,
    fragments: list[Fragment],
    missing: list[str],
    pool: ActorPool,
) -> None:
    """Write the score shards of the `missing` fragments."""
    total = sum(fragment.samples for fragment in fragments)
    from_embeddings = context.config.scores_embeddings
    read, actor = (read_viewed, ProbeActor) if from_embeddings else (read_samples, ScoreActor)
    left = set(missing)
    done = [fragment for fragment in fragments if fragment.fragment_id not in left]
    with context.progress.meter("extrapolate", total) as meter:
        meter.already(sum(fragment.samples for fragment in done))
        meter.queue(len(missing))

        def collect(result: UnitResult) -> None:
            meter.add(result.samples, result.unit)
            record.add_cost(result, pool.num_gpus)

        stream(
            missing,
            functools.partial(read, context.config, context.run.uri),
            functools.partial(actor, WorkerContext.of(context, pool)),
            pool,
            context.config.cluster.patience_seconds,
            collect,
            units_per_actor=UNITS_PER_ACTOR,
        )


def _pool(cluster: Cluster, settings: ExtrapolateSettings, exact: bool = True) -> ActorPool:
    """Return a pool with GPUs when they are set and the search is exact.

    Other searches run on CPUs and would only occupy the GPUs.
    """
    if not settings.use_gpu or not exact:
        return cluster.cpu_pool(settings.max_actors)
    return cluster.pool(
        PoolSettings(use_gpu=True, max_actors=settings.max_actors, actors_per_gpu=SEARCHERS_PER_GPU)
    )


class ScoreActor:
    """Applies the fitted extrapolators to whole fragments; writes one score shard per fragment."""

    def __init__(self, worker: WorkerContext) -> None:
        from raypipe.vision.devices import set_threads

        set_threads(worker.threads)
        config = worker.config
        self._run, self._watch, self._gpu = worker.run, Stopwatch(), worker.gpu
        parts = range(config.proxy.parts) if config.proxy.cross_fits else [None]
        self._extrapolators = [load_extrapolator(config, self._run, part) for part in parts]
        self._intervals = load_intervals(self._run)
        if worker.gpu:
            for extrapolator in self._extrapolators:
                extrapolator.search_on("cuda")
        self._scores = every_measured_score(self._run, config.score)
        self._equal_standing = config.proxy.cross_fits

    def __call__(self, fragment: str, batch: Batch) -> UnitResult:
        started, label = time.monotonic(), batch["label"]
        table = pa.table(
            {
                "sample_id": pa.array(batch["sample_id"].tolist(), pa.string()),
                "label": pa.array(label, pa.int32(), mask=label < 0),
            }
        )
        predicted, half_width = np.zeros(len(label), np.float32), np.zeros(len(label), np.float32)
        for part, extrapolator in enumerate(self._extrapolators):
            rows = np.flatnonzero(batch["part"] == part)
            if len(rows):
                predicted[rows], half_width[rows] = self._predict(extrapolator, batch, rows)
        write_scores(
            self._run, fragment, table, predicted, half_width, self._scores, self._equal_standing
        )
        gpu_seconds = time.monotonic() - started if self._gpu else 0.0
        return UnitResult(
            fragment, len(label), cpu_seconds=self._watch.lap(), gpu_seconds=gpu_seconds
        )

    def _predict(
        self, extrapolator: Any, batch: Batch, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the predicted scores of some samples, and half the width of their intervals."""
        from raypipe.extrapolators.base import Nodes

        label = batch["label"][rows].astype(np.int64)
        nodes = Nodes(batch["embedding"][rows], label, batch["signals"][rows])
        predicted, doubt = extrapolator.predict_with_doubt(nodes)
        return predicted, self._intervals.around(predicted, doubt, label)
