"""Extrapolate: fits the extrapolator on the seed set, judges its fidelity, then predicts the score of everything else.

Writes under `extrapolator/` the fitted model, the predictions it is judged by (see `raypipe.stages.extrapolate.assess`) and
`extrapolator.json` (method, fidelity, learning curve, intervals), and per fragment `scores/<fragment>.parquet`. A sample's
neighbours are looked up among the scored samples, so every fragment is independent; the exception is `gnn-published`, whose graph
is over the whole source and is held by one task. A sample of the audit set has its measured score there, once the fidelity is
known: it is the better one, and was compared with the predicted one first.
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
from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.cluster import ActorPool, Cluster
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.runs.embeddings import COLUMNS, nodes_of
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord
from raypipe.runs.measured_scores import every_measured_score
from raypipe.runs.score_shards import write_scores
from raypipe.runs.shards import count_rows, remove_stale
from raypipe.stages.base import Stage
from raypipe.stages.extrapolate.assess import (
    TRANSFER,
    is_assessed,
    load_extrapolator,
    load_intervals,
)
from raypipe.stages.extrapolate.fit import fit_extrapolator
from raypipe.stages.extrapolate.measured import WHOLE_METHODS

UNITS_PER_ACTOR = 16
"""Fragments of a thousand samples that take as long to score as an actor takes to import torch."""


class ExtrapolateStage(Stage):
    name = "extrapolate"
    needs = ("measure", "embed")

    def settings(self, config: Config) -> dict[str, Any]:
        settings = config.extrapolate.model_dump(mode="json", exclude={"max_actors", "use_gpu"})
        return {**settings, "rehearsal": config.rehearses, "score": config.score}

    def complete(self, context: Context, record: StageRecord) -> bool:
        run = context.run
        files = {
            "model.json",
            "model.safetensors",
            "extrapolator.json",
            *([TRANSFER] if context.config.rehearses else []),
        }
        fitted = files <= storage.names(run.path("extrapolator"))
        return (
            fitted
            and is_assessed(context.config, run)
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
        record.cpu_seconds += fit_extrapolator(
            context, missing, sum(fragment.samples for fragment in fragments)
        )
        judged = storage.read_json(run.path("extrapolator", "fidelity.json"))
        for note in search_notes(judged["search"], run.classes().names):
            context.progress.say(f"note: {note}")
        if config.extrapolate.use_gpu and judged["search"]["kind"] != "exact":
            context.progress.say(
                "note: extrapolate.use_gpu: more samples are scored than extrapolate.exact_neighbours, so that inverted lists are searched, by CPUs"
            )
            pool = _pool(context.cluster, config.extrapolate, exact=False)
        if config.extrapolate.method in WHOLE_METHODS:
            missing = []
        with context.progress.meter(
            "extrapolate", sum(fragment.samples for fragment in fragments)
        ) as meter:
            left = set(missing)
            meter.already(
                sum(fragment.samples for fragment in fragments if fragment.fragment_id not in left)
            )

            meter.queue(len(missing))

            def collect(result: dict[str, Any]) -> None:
                meter.add(result["samples"], result["unit"])
                record.cpu_seconds += result["cpu_seconds"]
                record.gpu_seconds += result["gpu_seconds"] * pool.num_gpus

            stream(
                missing,
                functools.partial(_read, run.uri),
                ScoreActor,
                {
                    "config": config,
                    "run_uri": run.uri,
                    "threads": pool.threads,
                    "gpu": pool.num_gpus > 0,
                },
                pool,
                config.cluster.patience_seconds,
                collect,
                UNITS_PER_ACTOR,
            )
        scores, embedded = count_rows(run, "scores"), count_rows(run, "embeddings")
        if scores != embedded:
            raise StageError(
                f"{embedded} samples are embedded, but {scores} have a score; run again to score the rest"
            )
        record.samples = scores
        record.detail = {
            "method": config.extrapolate.method,
            "score": config.score,
            "measured": judged["measured"],
            "fidelity": judged["fidelity"],
            "fidelity_seed": judged["fidelity_seed"],
            "search": judged["search"],
            "learning_curve": storage.read_json(run.path("extrapolator", "curve.json")),
        }
        about = {
            **record.detail,
            "confidence": config.extrapolate.confidence,
            "intervals": judged["intervals"],
        }
        file = run.path("extrapolator", "extrapolator.json")
        if not storage.exists(file) or storage.read_json(file) != about:
            storage.write_json(file, about)


def _pool(cluster: Cluster, settings: ExtrapolateSettings, exact: bool = True) -> ActorPool:
    """With GPUs where they are asked for and the search is exact; of another they would only be held."""
    if not settings.use_gpu or not exact:
        return cluster.cpu_pool(settings.max_actors)
    return cluster.pool(
        PoolSettings(use_gpu=True, max_actors=settings.max_actors, actors_per_gpu=SEARCHERS_PER_GPU)
    )


def search_notes(search: dict[str, Any], classes: tuple[str, ...]) -> list[str]:
    """What there is to say of the neighbour search, over all and within classes."""
    found = [(search["note"], "")]
    found += [
        (part["note"], f" (class {classes[int(y)]})")
        for y, part in search.get("classes", {}).items()
    ]
    return [note + where for note, where in found if note]


def _read(run_uri: str, fragment: str) -> Batch:
    """A fragment's embeddings. Runs in a task."""
    table = storage.read_table(Run(run_uri).path("embeddings", f"{fragment}.parquet"), COLUMNS)
    if not len(table):  # every sample was rejected; a row that says so keeps the unit alive
        return {
            "fragment": np.array([fragment]),
            "sample_id": np.array([""]),
            "label": np.array([-2], np.int32),
        }
    nodes = nodes_of(table)
    return {
        "fragment": np.full(len(table), fragment),
        "sample_id": np.array(table["sample_id"].to_pylist()),
        "label": nodes.label.astype(np.int32),
        "embedding": nodes.embedding,
        "signals": nodes.signals,
    }


class ScoreActor:
    """The fitted extrapolator, applied to whole fragments; writes one score shard per fragment."""

    def __init__(self, config: Config, run_uri: str, threads: int, gpu: bool = False) -> None:
        from raypipe.vision.devices import set_threads

        set_threads(threads)
        self._run, self._watch, self._gpu = Run(run_uri), Stopwatch(), gpu
        self._extrapolator, self._intervals = (
            load_extrapolator(config, self._run),
            load_intervals(self._run),
        )
        if gpu:
            self._extrapolator.search_on("cuda")
        self._scores = every_measured_score(self._run, config.score)

    def __call__(self, batch: Batch) -> Batch:
        from raypipe.extrapolators.base import Nodes

        started = time.monotonic()
        fragment, label = str(batch["fragment"][0]), batch["label"]
        count = 0 if label[0] == -2 else len(label)
        table = pa.table(
            {
                "sample_id": pa.array(batch["sample_id"][:count].tolist(), pa.string()),
                "label": pa.array(label[:count], pa.int32(), mask=label[:count] < 0),
            }
        )
        predicted = half_width = np.zeros(count, np.float32)
        if count:
            nodes = Nodes(batch["embedding"], label.astype(np.int64), batch["signals"])
            predicted, difficulty = self._extrapolator.predict_with_difficulty(nodes)
            half_width = self._intervals.half_width(difficulty, nodes.label)
        write_scores(self._run, fragment, table, predicted, half_width, self._scores)
        gpu_seconds = time.monotonic() - started if self._gpu else 0.0
        row = {
            "unit": fragment,
            "samples": count,
            "cpu_seconds": self._watch.lap(),
            "gpu_seconds": gpu_seconds,
        }
        return {key: np.array([value]) for key, value in row.items()}
