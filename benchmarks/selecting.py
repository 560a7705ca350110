"""What keep-lists cost: seconds, processor seconds and memory of `write_keep_lists`, on synthetic scores and losses on the local disk.

    python benchmarks/selecting.py [--samples 10000000] [--shards 1000] [--classes 1000] [--strategies top,ccs,...] [--keep 0.3,0.5]

Each strategy in a process of its own; memory is the most that it had, of which an import takes part. Scores and losses are random; the
files of a size are made once and kept where --dir is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Literal

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import SelectSettings, TrustSettings, parse_config
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord
from raypipe.selection import STRATEGIES
from raypipe.stages.select.stage import make_keep_lists


def make(uri: str, samples: int, shards: int, classes: int) -> None:
    """The files of a run that keep-lists are made from."""
    run, draw = Run(uri), np.random.default_rng(0)
    storage.write_json(
        run.path("index", "classes.json"),
        {"names": [f"class-{number}" for number in range(classes)], "numeric": False},
    )
    for shard, rows in enumerate(np.array_split(np.arange(samples), shards)):
        ids = pa.array([f"train-{shard:05d}.tar/{row:09d}" for row in rows.tolist()], pa.string())
        label = pa.array(draw.integers(classes, size=len(rows)), pa.int32())
        numbers = {
            name: pa.array(draw.normal(size=len(rows)).astype(np.float32))
            for name in ("score", "loss")
        }
        for folder, name in (("scores", "score"), ("embeddings", "loss")):
            table = pa.table({"sample_id": ids, "label": label, name: numbers[name]})
            storage.write_table(run.path(folder, f"{shard:05d}.parquet"), table)
    detail = {"measured": samples, "score": "moso"}
    run.write_ledger({"extrapolate": StageRecord(state="done", samples=samples, detail=detail)})
    run.write_config(parse_config({"run": uri, "source": {"uri": "x"}}))


def one(uri: str, strategy: str, keep: list[float], by_class: bool | Literal["auto"]) -> None:
    """In a process of its own: make the lists once, and print what it took."""
    settings = SelectSettings(strategy=strategy, keep=tuple(keep), by_class=by_class)  # type: ignore[arg-type]
    wall, cpu = time.perf_counter(), time.process_time()
    make_keep_lists(Run(uri), settings, keep, TrustSettings())
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps(took | {"memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="names with commas")
    parser.add_argument("--keep", default="0.3,0.5,0.7,0.9")
    parser.add_argument(
        "--by-class", action="store_true", help="every strategy within classes (otherwise: ccs)"
    )
    parser.add_argument("--dir", help="where the files are kept")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep = [float(fraction) for fraction in arguments.keep.split(",")]
    if arguments.run:
        one(arguments.run, arguments.strategies, keep, arguments.by_class or "auto")
        return
    with tempfile.TemporaryDirectory() as own:
        uri = os.path.join(
            arguments.dir or own, f"{arguments.samples}-{arguments.shards}-{arguments.classes}"
        )
        if not os.path.exists(f"{uri}/run.json"):
            make(uri, arguments.samples, arguments.shards, arguments.classes)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores; {arguments.samples:,} samples in {arguments.shards:,} shards, "
            f"{arguments.classes:,} classes{', within classes' * arguments.by_class}; lists of {arguments.keep}"
        )
        print(f"{'':<12}{'wall s':>10}{'cpu s':>10}{'MB':>10}")
        for strategy in arguments.strategies.split(","):
            command = [
                sys.executable,
                __file__,
                "--run",
                uri,
                "--strategies",
                strategy,
                "--keep",
                arguments.keep,
            ]
            command += ["--by-class"] * arguments.by_class
            took = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout
            )
            print(
                f"{strategy:<12}{took['wall']:>10.1f}{took['cpu']:>10.1f}{took['memory'] / 1e6:>10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
