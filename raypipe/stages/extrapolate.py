"""Extrapolate: fits the extrapolator on the seed set, judges its fidelity, then predicts the score of everything else.

Writes `extrapolator/model.safetensors` and `extrapolator/extrapolator.json` (method, fidelity, intervals), then per
fragment `scores/<fragment>.parquet`. A sample's neighbours are looked up among the scored samples, so every fragment is
independent; the exception is `gnn-published`, whose graph is over the whole source and is held by one task.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.rundir import Run, StageRecord
from raypipe.stages.base import Context, Stage
from raypipe.stages.embed import SIGNALS, count_rows, read_seed_rows, remove_stale
from raypipe.stages.streaming import Columns, Stopwatch, failure, stream

SCORE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("label", pa.int32()),
        ("score", pa.float32()),
        ("lower", pa.float32()),
        ("upper", pa.float32()),
        ("measured", pa.bool_()),
    ]
)
COLUMNS = ["sample_id", "label", "embedding", *SIGNALS]
WHOLE_METHODS = {"gnn-published"}
"""Extrapolators whose graph is over the whole source."""


class ExtrapolateStage(Stage):
    name = "extrapolate"
    needs = ("measure", "embed")

    def settings(self, config: Config) -> dict[str, Any]:
        return {**config.extrapolate.model_dump(mode="json", exclude={"max_actors"}), "score": config.score}

    def complete(self, context: Context, record: StageRecord) -> bool:
        run = context.run
        return "extrapolator.json" in storage.names(run.path("extrapolator")) and run.done("scores") == run.done("embeddings")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        fragments = [fragment for fragment in run.fragments() if not fragment.error]
        remove_stale(run, fragments, ("scores",))
        done = run.done("scores")
        missing = [fragment.fragment_id for fragment in fragments if fragment.fragment_id not in done]
        whole = config.extrapolate.method in WHOLE_METHODS
        pool = context.cluster.cpu_pool(config.extrapolate.max_actors)
        cpus = max(1, int(context.cluster.largest_node_cpus))
        if whole or "extrapolator.json" not in storage.names(run.path("extrapolator")):
            units = missing if whole else []
            record.cpu_seconds += _fit(context, cpus, units, sum(fragment.samples for fragment in fragments))
            missing = [] if whole else missing
        with context.progress.meter("extrapolate", sum(fragment.samples for fragment in fragments)) as meter:
            meter.already(sum(fragment.samples for fragment in fragments if fragment.fragment_id not in set(missing)))

            def collect(result: dict[str, Any]) -> None:
                meter.add(result["samples"])
                record.cpu_seconds += result["cpu_seconds"]

            stream(
                missing,
                functools.partial(_read, run.uri),
                ScoreActor,
                {"config": config, "run_uri": run.uri, "threads": pool.threads},
                pool,
                config.cluster.patience_seconds,
                collect,
            )
        scores, embedded = count_rows(run, "scores"), count_rows(run, "embeddings")
        if scores != embedded:
            raise StageError(f"{embedded} samples are embedded, but {scores} have a score; run again to score the rest")
        saved = storage.read_json(run.path("extrapolator", "extrapolator.json"))
        record.samples = scores
        record.detail = {
            "method": saved["method"],
            "score": saved["score"],
            "measured": saved["measured"],
            "fidelity": saved["fidelity"],
        }


def _fit(context: Context, cpus: int, fragments: list[str], samples: int) -> float:
    """Fit in one task with all CPUs of a machine, showing its progress; `fragments` are scored by the same task."""
    import ray

    # one task, so the machine's processors are its own; on a shared cluster it takes its place like any other
    fit = ray.remote(num_cpus=cpus, max_retries=3)(_fit_task)
    seconds = 0.0
    with context.progress.meter("fit", 0, "epochs") as meter:
        try:
            for reference in fit.options(num_returns="streaming").remote(
                context.config, context.run.uri, cpus, fragments, samples
            ):
                done, total, seconds = ray.get(reference)
                meter.expect(total)
                meter.add(done - meter.count)
        except Exception as error:
            raise failure(error) from error
    return seconds


def _fit_task(config: Config, run_uri: str, threads: int, fragments: list[str], samples: int) -> Iterator[tuple[int, int, float]]:
    """Yields (epochs done, of, processor seconds). Runs in a task."""
    import queue
    import threading

    import torch

    torch.set_num_threads(threads)
    watch, run = Stopwatch(), Run(run_uri)
    steps: queue.Queue[tuple[int, int] | BaseException | None] = queue.Queue()

    def work() -> None:
        torch.set_num_threads(threads)  # it counts per thread
        try:
            if config.extrapolate.method in WHOLE_METHODS:
                _whole(config, run, fragments, samples, lambda done, total: steps.put((done, total)))
            else:
                _fit_and_judge(config, run, None, lambda done, total: steps.put((done, total)))
            steps.put(None)
        except BaseException as error:
            steps.put(error)

    threading.Thread(target=work, daemon=True).start()
    seconds = 0.0
    done = total = 1
    while (step := steps.get()) is not None:
        if isinstance(step, BaseException):
            raise step
        done, total = step
        seconds += watch.lap()
        yield done, total, seconds
    yield done, total, seconds + watch.lap()


def nodes_of(table: pa.Table) -> Any:
    """Samples of a table of embeddings as the extrapolators see them."""
    from raypipe.extrapolate.base import Nodes

    column = table["embedding"].combine_chunks()
    embedding = np.asarray(column.flatten(), np.float32).reshape(len(table), -1)
    label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    signals = np.stack([table[name].to_numpy() for name in SIGNALS], 1).astype(np.float32)
    return Nodes(embedding, label, signals)


def measured_scores(run: Run, score: str) -> dict[str, float]:
    """A measured score of every seed sample by id."""
    result: dict[str, float] = {}
    for _, table in storage.iter_tables(run.path("measured"), ["sample_id", score]):
        result.update(zip(table["sample_id"].to_pylist(), table[score].to_pylist(), strict=True))
    return result


def _seed_table(run: Run, scores: dict[str, float]) -> tuple[pa.Table, np.ndarray]:
    """Embeddings and measured scores of the seed set, in the order of fragment names."""
    with ThreadPoolExecutor(16) as threads:
        parts = list(threads.map(lambda fragment: read_seed_rows(run, fragment), sorted(run.done("embeddings"))))
    tables = [part.select(COLUMNS).replace_schema_metadata(None) for part in parts if part is not None]
    if not tables:
        raise StageError("no seed sample has an embedding; the source changed completely. Use a new run folder")
    table = pa.concat_tables(tables)
    known = np.array([sample_id in scores for sample_id in table["sample_id"].to_pylist()])
    table = table.filter(pa.array(known))
    return table, np.array([scores[sample_id] for sample_id in table["sample_id"].to_pylist()], np.float32)


def _fit_and_judge(config: Config, run: Run, graph: Any, progress: Any) -> Any:
    """Judge on held-out seed samples, fit on all, write the extrapolator. Returns it.

    graph  (all nodes, rows of the scored ones, their scores) for extrapolators over the whole source
    """
    from safetensors.numpy import save

    from raypipe.extrapolate import make
    from raypipe.extrapolate.conformal import Conformal
    from raypipe.extrapolate.fidelity import judge

    settings, classes = config.extrapolate, len(run.classes().names)
    if graph is None:
        table, score = _seed_table(run, measured_scores(run, config.score))
        nodes, everything, rows = nodes_of(table), None, None
    else:
        everything, rows, score = graph
        nodes = everything.take(rows)

    def factory() -> Any:
        return make(settings, classes)

    fidelity = judge(factory, nodes, score, settings.holdout, settings.seed, everything, rows)
    extrapolator = factory()
    if graph is None:
        extrapolator.fit(nodes, score, progress)
    else:
        extrapolator.fit_graph(everything, rows, score, progress)
    intervals = Conformal.fit(fidelity.residual, fidelity.difficulty, settings.confidence)
    tensors, meta = extrapolator.state()
    storage.write_bytes(run.path("extrapolator", "model.safetensors"), save(tensors))
    storage.write_json(
        run.path("extrapolator", "extrapolator.json"),
        {
            "method": settings.method,
            "score": config.score,
            "measured": len(score),
            "fidelity": fidelity.as_dict(),
            "confidence": settings.confidence,
            "intervals": intervals.state(),
            "meta": meta,
        },
    )
    return extrapolator


def _load(config: Config, run: Run) -> tuple[Any, Any]:
    """The fitted extrapolator and its intervals."""
    from safetensors.numpy import load

    from raypipe.extrapolate import make
    from raypipe.extrapolate.conformal import Conformal

    saved = storage.read_json(run.path("extrapolator", "extrapolator.json"))
    extrapolator = make(config.extrapolate, len(run.classes().names))
    extrapolator.load_state(load(storage.read_bytes(run.path("extrapolator", "model.safetensors"))), saved["meta"])
    return extrapolator, Conformal.from_state(saved["intervals"])


def _whole(config: Config, run: Run, fragments: list[str], samples: int, progress: Any) -> None:
    """Fit a graph over the whole source and score the given fragments."""
    import psutil

    from raypipe.extrapolate.base import Nodes

    names = sorted(run.done("embeddings"))
    first = storage.read_table(run.path("embeddings", f"{names[0]}.parquet"), ["embedding"])
    width = first.schema.field("embedding").type.list_size
    needed, free = 3 * 4 * samples * width, psutil.virtual_memory().available
    if needed > free:
        raise StageError(
            f"{config.extrapolate.method} holds the whole source in one process: about {needed / 2**30:.1f} GiB for {samples:,} samples, "
            f"but {free / 2**30:.1f} GiB are free here; extrapolate.method gnn has no such limit"
        )
    scores = measured_scores(run, config.score)
    tables = [storage.read_table(run.path("embeddings", f"{name}.parquet"), COLUMNS) for name in names]
    offsets = np.cumsum([0, *(len(table) for table in tables)])
    everything = Nodes.concat([nodes_of(table) for table in tables])
    ids = [sample_id for table in tables for sample_id in table["sample_id"].to_pylist()]
    rows = np.array([row for row, sample_id in enumerate(ids) if sample_id in scores], np.int64)
    score = np.array([scores[ids[row]] for row in rows], np.float32)
    if "extrapolator.json" not in storage.names(run.path("extrapolator")):
        _fit_and_judge(config, run, (everything, rows, score), progress)
    extrapolator, intervals = _load(config, run)
    extrapolator.attach_graph(everything)
    for fragment in fragments:
        position = names.index(fragment)
        part = np.arange(offsets[position], offsets[position + 1])
        width_of = intervals.half_width(extrapolator.difficulty(everything.take(part)))
        _write_scores(run, fragment, tables[position], extrapolator.predict_rows(part), width_of, scores)


def _write_scores(
    run: Run, fragment: str, table: pa.Table, predicted: np.ndarray, half_width: np.ndarray, scores: dict[str, float]
) -> None:
    """One score shard; a measured sample keeps its measured score, without an interval around it."""
    ids = table["sample_id"].to_pylist()
    measured = np.array([sample_id in scores for sample_id in ids], bool)
    own = np.array([scores.get(sample_id, 0.0) for sample_id in ids], np.float32)
    score = np.where(measured, own, predicted).astype(np.float32)
    if not np.isfinite(score).all():
        raise StageError(f"{int((~np.isfinite(score)).sum())} predicted scores of fragment {fragment} are not finite")
    half = np.where(measured, 0, half_width).astype(np.float32)
    columns = [table["sample_id"], table["label"], score, score - half, score + half, measured]
    storage.write_table(run.path("scores", f"{fragment}.parquet"), pa.table(columns, schema=SCORE_SCHEMA))


def _read(run_uri: str, fragment: str) -> Columns:
    """A fragment's embeddings. Runs in a task."""
    table = storage.read_table(Run(run_uri).path("embeddings", f"{fragment}.parquet"), COLUMNS)
    if not len(table):  # every sample was rejected; a row that says so keeps the unit alive
        return {"fragment": np.array([fragment]), "sample_id": np.array([""]), "label": np.array([-2], np.int32)}
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

    def __init__(self, config: Config, run_uri: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._run, self._watch = Run(run_uri), Stopwatch()
        self._extrapolator, self._intervals = _load(config, self._run)
        self._scores = measured_scores(self._run, config.score)

    def __call__(self, batch: Columns) -> Columns:
        from raypipe.extrapolate.base import Nodes

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
            predicted = self._extrapolator.predict(nodes)
            half_width = self._intervals.half_width(self._extrapolator.difficulty(nodes))
        _write_scores(self._run, fragment, table, predicted, half_width, self._scores)
        row = {"unit": fragment, "samples": count, "cpu_seconds": self._watch.lap()}
        return {key: np.array([value]) for key, value in row.items()}
