"""Fitting the extrapolator: judging it, fitting it, and, where its graph is over the whole source, applying it.

Each is a task of one thread (the networks are small, and more threads mostly wait for one another) that writes one file under
`extrapolator/`: `fidelity.json` from a fit on a part of the seed set, `model.json` and `model.safetensors` from the fit on all
of it. Judge and fit run side by side; an interrupted stage repeats only the one that is missing.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.rundir import Run
from raypipe.stages.base import Context
from raypipe.stages.embed import SIGNALS, read_seed_rows
from raypipe.stages.streaming import Stopwatch, failure

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
Step = Callable[[int, int], None]


def fit_extrapolator(context: Context, missing: list[str], samples: int) -> float:
    """Do what of judge, fit and (for a graph over the whole source) scoring of the `missing` fragments is not done yet.

    Returns processor seconds.
    """
    config, run = context.config, context.run
    whole = config.extrapolate.method in WHOLE_METHODS
    there = storage.names(run.path("extrapolator"))
    parts: list[list[tuple[str, Callable[..., None]]]] = [[]]
    if "fidelity.json" not in there:
        parts[-1].append(("judge", _judge))
    if "model.json" not in there:
        parts += [[]] if whole else []  # a graph over the whole source is held once at a time
        parts[-1].append(("fit", _fit))
    if whole and missing:
        parts.append([("score", functools.partial(_score_whole, missing))])
    context.cluster  # Ray is started before tasks are made
    return sum(_run(context, dict(group), samples) for group in parts if group)


def _run(context: Context, parts: dict[str, Callable[..., None]], samples: int) -> float:
    """Run parts side by side, each in a task, showing their progress together."""
    task = ray.remote(num_cpus=1, max_retries=3)(_in_task).options(num_returns="streaming")
    streams = {name: task.remote(part, context.config, context.run.uri, samples) for name, part in parts.items()}
    done, totals, seconds = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0), dict.fromkeys(parts, 0.0)
    steps: queue.Queue[tuple[str, Any]] = queue.Queue()

    def follow(name: str) -> None:
        try:
            for reference in streams[name]:
                steps.put((name, ray.get(reference)))
            steps.put((name, None))
        except Exception as error:
            steps.put((name, error))

    for name in parts:
        threading.Thread(target=follow, args=(name,), daemon=True).start()
    running = set(parts)
    with context.progress.meter("+".join(parts), 0, "epochs") as meter:
        while running:
            name, step = steps.get()
            if isinstance(step, Exception):
                raise failure(step) from step
            if step is None:
                running.remove(name)
                continue
            done[name], totals[name], seconds[name] = step
            meter.expect(sum(totals.values()))
            meter.add(sum(done.values()) - meter.count)
    return sum(seconds.values())


def _in_task(part: Callable[..., None], config: Config, run_uri: str, samples: int) -> Iterator[tuple[int, int, float]]:
    """Yields (steps done, of, processor seconds) while the part works in a thread. Runs in a task."""
    import torch

    watch = Stopwatch()
    steps: queue.Queue[tuple[int, int] | BaseException | None] = queue.Queue()

    def work() -> None:
        torch.set_num_threads(1)
        try:
            part(config, Run(run_uri), samples, lambda done, total: steps.put((done, total)))
            steps.put(None)
        except BaseException as error:
            steps.put(error)

    threading.Thread(target=work, daemon=True).start()
    seconds, done, total = 0.0, 1, 1
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


class _Graph:
    """Everything in the source, for an extrapolator whose graph is over all of it; or the seed set alone, for the others."""

    def __init__(self, config: Config, run: Run, samples: int) -> None:
        from raypipe.extrapolate.base import Nodes

        scores = measured_scores(run, config.score)
        self.whole = config.extrapolate.method in WHOLE_METHODS
        if not self.whole:
            table, self.score = _seed_table(run, scores)
            self.seed, self.nodes, self.rows = nodes_of(table), None, None
            return
        self.names = sorted(run.done("embeddings"))
        _check_memory(config, run, self.names[0], samples)
        self.tables = [storage.read_table(run.path("embeddings", f"{name}.parquet"), COLUMNS) for name in self.names]
        self.nodes = everything = Nodes.concat([nodes_of(table) for table in self.tables])
        ids = [sample_id for table in self.tables for sample_id in table["sample_id"].to_pylist()]
        self.rows = np.array([row for row, sample_id in enumerate(ids) if sample_id in scores], np.int64)
        self.score = np.array([scores[ids[row]] for row in self.rows], np.float32)
        self.seed, self.scores = everything.take(self.rows), scores


def _check_memory(config: Config, run: Run, fragment: str, samples: int) -> None:
    table = storage.read_table(run.path("embeddings", f"{fragment}.parquet"), ["embedding"])
    needed = 3 * 4 * samples * table.schema.field("embedding").type.list_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * memory:
        raise StageError(
            f"{config.extrapolate.method} holds the whole source in one process: about {needed / 2**30:.1f} GiB for "
            f"{samples:,} samples, but this machine has {memory / 2**30:.1f} GiB; extrapolate.method gnn has no such limit"
        )


def _judge(config: Config, run: Run, samples: int, step: Step) -> None:
    """Write fidelity and intervals, from held-out seed samples."""
    from raypipe.extrapolate import make
    from raypipe.extrapolate.conformal import Conformal
    from raypipe.extrapolate.fidelity import judge

    settings, graph, classes = config.extrapolate, _Graph(config, run, samples), len(run.classes().names)
    found = judge(
        lambda: make(settings, classes), graph.seed, graph.score, settings.holdout, settings.seed, graph.nodes, graph.rows, step
    )
    intervals = Conformal.fit(found.residual, found.difficulty, settings.confidence)
    data = {"measured": len(graph.score), "fidelity": found.as_dict(), "intervals": intervals.state()}
    storage.write_json(run.path("extrapolator", "fidelity.json"), data)


def _fit(config: Config, run: Run, samples: int, step: Step) -> None:
    """Write the extrapolator fitted on the whole seed set."""
    from safetensors.numpy import save

    from raypipe.extrapolate import make

    graph = _Graph(config, run, samples)
    extrapolator = make(config.extrapolate, len(run.classes().names))
    if graph.whole:
        extrapolator.fit_graph(graph.nodes, graph.rows, graph.score, step)  # type: ignore[attr-defined]
    else:
        extrapolator.fit(graph.seed, graph.score, step)
    tensors, meta = extrapolator.state()
    storage.write_bytes(run.path("extrapolator", "model.safetensors"), save(tensors))
    storage.write_json(run.path("extrapolator", "model.json"), meta)


def load_extrapolator(config: Config, run: Run) -> tuple[Any, Any]:
    """The fitted extrapolator and its intervals."""
    from safetensors.numpy import load

    from raypipe.extrapolate import make
    from raypipe.extrapolate.conformal import Conformal

    extrapolator = make(config.extrapolate, len(run.classes().names))
    meta = storage.read_json(run.path("extrapolator", "model.json"))
    extrapolator.load_state(load(storage.read_bytes(run.path("extrapolator", "model.safetensors"))), meta)
    return extrapolator, Conformal.from_state(storage.read_json(run.path("extrapolator", "fidelity.json"))["intervals"])


def _score_whole(fragments: list[str], config: Config, run: Run, samples: int, step: Step) -> None:
    """Write the score shards of some fragments from the graph over the whole source."""
    graph = _Graph(config, run, samples)
    extrapolator, intervals = load_extrapolator(config, run)
    assert graph.nodes is not None
    extrapolator.attach_graph(graph.nodes)
    offsets = np.cumsum([0, *(len(table) for table in graph.tables)])
    for number, fragment in enumerate(fragments):
        position = graph.names.index(fragment)
        part = np.arange(offsets[position], offsets[position + 1])
        half_width = intervals.half_width(extrapolator.difficulty(graph.nodes.take(part)))
        write_scores(run, fragment, graph.tables[position], extrapolator.predict_rows(part), half_width, graph.scores)
        step(number + 1, len(fragments))


def write_scores(
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
