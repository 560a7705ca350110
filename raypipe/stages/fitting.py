"""Fitting the extrapolator: judging it, fitting it, and, where its graph is over the whole source, applying it.

Each part is a task of one thread (the networks are small, and more threads mostly wait for one another) that writes a file under
`extrapolator/`: `model.json` and `model.safetensors` from the fit on the whole seed set, and what `raypipe.stages.judging` says.
Parts that do not need one another run side by side; an interrupted stage repeats only those that are missing.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.rundir import Run
from raypipe.stages.base import Context
from raypipe.stages.judging import (
    TRANSFER,
    Step,
    folds,
    is_judged,
    judges_published,
    load_extrapolator,
    load_intervals,
    make_extrapolator,
    rehearsed,
    write_curve,
    write_fidelity,
    write_fold,
    write_published,
    write_rehearsal,
)
from raypipe.stages.scored import WHOLE_METHODS, Samples, every_measured_score
from raypipe.stages.streaming import Stopwatch, failure
from raypipe.storage.fences import fenced

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
Part = Callable[[Config, Run, int, Step], None]


def fit_extrapolator(context: Context, missing: list[str], samples: int) -> float:
    """Do what of fitting, judging and (for a graph over the whole source) scoring of the `missing` fragments is not done yet.

    Returns processor seconds.
    """
    config, run = context.config, context.run
    whole, there = config.extrapolate.method in WHOLE_METHODS, storage.names(run.path("extrapolator"))
    wanted: dict[str, tuple[str, Part]] = {}
    if judges_published(config, samples):
        wanted["published"] = ("published.parquet", write_published)  # first, since it takes longest
    wanted["fit"] = ("model.json", _fit)
    for number in range(folds(config, run)):
        wanted[f"judge-{number}"] = (f"fold-{number}.parquet", functools.partial(write_fold, number))
    wanted["curve"] = ("curve.json", write_curve)
    if rehearsed(run):
        wanted["rehearse"] = (TRANSFER, write_rehearsal)
    left = {name: part for name, (file, part) in wanted.items() if file not in there}
    # a graph over the whole source is held once at a time
    groups = [{name: part} for name, part in left.items()] if whole else [left]
    if not is_judged(config, run):
        groups.append({"fidelity": write_fidelity})
    if whole and missing:
        groups.append({"score": functools.partial(_score_whole, missing)})
    context.cluster  # Ray is started before tasks are made
    return sum(run_parts(context, group, samples) for group in groups if group)


def run_parts(context: Context, parts: dict[str, Part], samples: int, cpus: int = 1, gpus: int = 0) -> float:
    """Run parts side by side, each in a task of so many threads, showing their progress together. Returns processor seconds."""
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_in_task).options(num_returns="streaming")
    streams = {name: task.remote(fenced(part), context.config, context.run.uri, samples, cpus) for name, part in parts.items()}
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
    with context.progress.meter("+".join(dict.fromkeys(name.partition("-")[0] for name in parts)), 0, "epochs") as meter:
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


def _in_task(part: Part, config: Config, run_uri: str, samples: int, threads: int) -> Iterator[tuple[int, int, float]]:
    """Yields (steps done, of, processor seconds) while the part works in a thread. Runs in a task."""
    from raypipe.devices import compute_on

    watch = Stopwatch()
    steps: queue.Queue[tuple[int, int] | BaseException | None] = queue.Queue()

    def work() -> None:
        compute_on(threads)
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


def _fit(config: Config, run: Run, samples: int, step: Step) -> None:
    """Write the extrapolator fitted on the whole seed set."""
    from safetensors.numpy import save

    data = Samples(config, run, samples, config.extrapolate.method in WHOLE_METHODS)
    extrapolator = make_extrapolator(config, run)
    if data.whole:
        extrapolator.fit_graph(data.everything, data.seed.rows, data.seed.score, step)
    else:
        extrapolator.fit(data.seed.nodes, data.seed.score, step)
    tensors, meta = extrapolator.state()
    storage.write_bytes(run.path("extrapolator", "model.safetensors"), save(tensors))
    storage.write_json(run.path("extrapolator", "model.json"), meta)


def _score_whole(fragments: list[str], config: Config, run: Run, samples: int, step: Step) -> None:
    """Write the score shards of some fragments from the graph over the whole source."""
    data, scores = Samples(config, run, samples, whole=True), every_measured_score(run, config.score)
    extrapolator, intervals = load_extrapolator(config, run), load_intervals(run)
    extrapolator.attach_graph(data.everything)
    offsets = np.cumsum([0, *(len(table) for table in data.tables)])
    for number, fragment in enumerate(fragments):
        position = data.names.index(fragment)
        part = np.arange(offsets[position], offsets[position + 1])
        nodes = data.everything.take(part)
        half_width = intervals.half_width(extrapolator.difficulty(nodes), nodes.label)
        write_scores(run, fragment, data.tables[position], extrapolator.predict_rows(part), half_width, scores)
        step(number + 1, len(fragments))


def write_scores(
    run: Run, fragment: str, table: pa.Table, predicted: np.ndarray, half_width: np.ndarray, scores: dict[str, float]
) -> None:
    """One score shard; a measured sample, of the seed or the audit set, has its measured score, without an interval around it."""
    ids = table["sample_id"].to_pylist()
    measured = np.array([sample_id in scores for sample_id in ids], bool)
    own = np.array([scores.get(sample_id, 0.0) for sample_id in ids], np.float32)
    score = np.where(measured, own, predicted).astype(np.float32)
    if not np.isfinite(score).all():
        raise StageError(f"{int((~np.isfinite(score)).sum())} predicted scores of fragment {fragment} are not finite")
    half = np.where(measured, 0, half_width).astype(np.float32)
    columns = [table["sample_id"], table["label"], score, score - half, score + half, measured]
    storage.write_table(run.path("scores", f"{fragment}.parquet"), pa.table(columns, schema=SCORE_SCHEMA))
