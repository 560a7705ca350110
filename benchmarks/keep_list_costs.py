"""What the benchmarks of keep-lists share: a made-up run to cut lists from, and a process that cuts them and says what that took."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import SelectSettings, TrustSettings, parse_config
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.select.stage import make_keep_lists

Columns = dict[str, pa.Array]


def write_run(
    uri: str,
    classes: int,
    score: str,
    shards: Iterable[tuple[Columns, Columns, Columns]],
) -> None:
    """The files of a run that keep-lists are cut from.

    `shards` has the columns sample_id and label of each shard, those of its scores, and those of its embeddings.
    """
    run, samples = Run(uri), 0
    names = [f"class-{number}" for number in range(classes)]
    storage.write_json(run.classes_file, {"names": names, "numeric": False})
    for number, (named, scores, embeddings) in enumerate(shards):
        table = pa.table({**named, **scores})
        storage.write_table(run.score_shard(f"{number:05d}"), table)
        storage.write_table(run.embedding_shard(f"{number:05d}"), pa.table({**named, **embeddings}))
        samples += len(table)
    detail = {"measured": samples, "score": score}
    run.write_ledger({"extrapolate": StageRecord(state="done", samples=samples, detail=detail)})
    run.write_config(parse_config({"run": uri, "source": {"uri": "x"}}))


def print_cost(uri: str, settings: SelectSettings) -> None:
    """In a process of its own: write the lists once, and print what it took as JSON."""
    wall, cpu = time.perf_counter(), time.process_time()
    make_keep_lists(Run(uri), settings, TrustSettings())
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps(took | {"memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def cost_of(file: str, *options: str, threads: int | None = None) -> dict[str, Any]:
    """Run a benchmark with options that make it call `print_cost`; return seconds and bytes."""
    command: Sequence[str] = [sys.executable, file, *options]
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def columns_of_cost(took: dict[str, Any]) -> str:
    """The seconds, processor seconds and megabytes of a row."""
    return f"{took['wall']:>10.1f}{took['cpu']:>10.1f}{took['memory'] / 1e6:>10.0f}"
