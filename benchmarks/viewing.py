"""How fast `raypipe view` answers: seconds to start and to search, and memory, over HTTP, on random scores and embeddings on the local disk.

    python benchmarks/viewing.py [--samples 100000] [--shards 100] [--classes 1000] [--width 512]

Every question is put once more than is reported: the first answer sorts, cuts or copies what later ones use, and is in a column of its own.
Images are left out: what they take depends on the source.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
import urllib.request

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import parse_config
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.select.stage import write_keep_lists
from raypipe.view.answers import Answers
from raypipe.view.server import TOKEN_HEADER, ViewServer

QUESTIONS = {
    "first page": "samples?sort=lowest",
    "class and score": "samples?label=3&low=0&high=1&sort=highest",
    "widest intervals": "samples?sort=uncertain",
    "labels to check": "samples?doubtful=1000&sort=labels",
    "part of the id": "samples?text=00012",
    "kept at 0.5, stored": "samples?keep=0.5&kept=kept",
    "pruned at 0.37, cut": "samples?keep=0.37&kept=pruned",
    "one sample": "sample?row=77",
}


def write_run(uri: str, samples: int, shards: int, classes: int, width: int) -> Run:
    """Write a finished run of random numbers, with a keep-list."""
    run, draw = Run(uri), np.random.default_rng(0)
    run.write_config(
        parse_config({"run": uri, "source": {"uri": "memory"}, "select": {"strategy": "top"}})
    )
    names = [f"class {number}" for number in range(classes)]
    storage.write_json(run.classes_file, {"names": names, "numeric": True})
    for shard, rows in enumerate(np.array_split(np.arange(samples), shards)):
        count = len(rows)
        ids = pa.array([f"train-{shard:05d}.tar/{row:09d}" for row in rows.tolist()], pa.string())
        label = pa.array(draw.integers(classes, size=count), pa.int32())
        score = draw.normal(size=count).astype(np.float32)
        half = draw.random(count).astype(np.float32)
        columns = {"score": score, "lower": score - half, "upper": score + half}
        table = pa.table(
            {"sample_id": ids, "label": label, **columns, "measured": draw.random(count) < 0.1}
        )
        storage.write_table(run.score_shard(f"{shard:05d}"), table)
        vectors = draw.normal(size=count * width).astype(np.float32)
        statistics_of_proxy = {
            "prediction": pa.array(draw.integers(classes, size=count), pa.int32()),
            "confidence": draw.random(count).astype(np.float32),
            "margin": draw.normal(size=count).astype(np.float32),
        }
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors), width)
        table = pa.table(
            {"sample_id": ids, "label": label, "embedding": embedding, **statistics_of_proxy}
        )
        storage.write_table(run.embedding_shard(f"{shard:05d}"), table)
    figures = {"measured": samples // 10, "fidelity": {"spearman": 0.9}}
    run.write_ledger({"extrapolate": StageRecord("done", samples=samples, detail=figures)})
    write_keep_lists(run, run.config().select)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(
            os.path.join(folder, "run"),
            arguments.samples,
            arguments.shards,
            arguments.classes,
            arguments.width,
        )
        started = time.perf_counter()
        answers = Answers(run)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores; {arguments.samples:,} samples in "
            f"{arguments.shards:,} shards, {arguments.classes:,} classes, embeddings of "
            f"{arguments.width}"
        )
        print(f"start: {time.perf_counter() - started:.2f} s")
        print(f"{'milliseconds':<24}{'first':>8}{'median':>8}{'most':>8}")
        with ViewServer(answers) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            for name, question in QUESTIONS.items():
                took = [ask(server, question) for _ in range(arguments.repeats + 1)]
                columns = took[0], statistics.median(took[1:]), max(took[1:])
                print(name.ljust(24) + "".join(f"{1000 * value:8.0f}" for value in columns))
            server.shutdown()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"memory: {peak:,} MB at most, with the writing of the run and mapped files")


def ask(server: ViewServer, question: str) -> float:
    """Return the seconds until the whole answer has arrived."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server_address[1]}/api/{question}",
        headers={TOKEN_HEADER: server.token},
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        json.loads(answer.read())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
