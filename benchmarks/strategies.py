"""What keep-lists by strategies that compare embeddings cost: seconds, processor seconds and memory of `write_keep_lists`.

    python benchmarks/strategies.py [--samples 100000,1000000] [--strategies band,d2,infomax,coverage,typical] [--keep 0.3] [--threads 2]
        [--classes 100] [--whole] [--dir FOLDER]

Each strategy in a process of its own, on a made-up run on the local disk: scores, losses, and embeddings of 128 dimensions in float16. In each
class the embeddings have 8 clusters, in each of them a 16-dimensional Gaussian and noise in all directions; the score follows the loss with
noise. Memory is the most that the process had. Reading the run and writing the lists are included; --keep with commas writes several lists
at once. By default lists are cut within classes; with --whole over all samples, in blocks of 65,536. The runs of a size are made once and kept
where --dir is given.
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

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import SelectSettings, TrustSettings, parse_config
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.select.stage import make_keep_lists

WIDTH, INNER, CLUSTERS = 128, 16, 8
SHARD = 20_000
"""Samples in a shard."""
STRATEGIES = "band,d2,infomax,coverage,typical"
LIMIT_SECONDS, LIMIT_BYTES = 600, 4e9
"""What a strategy may take for a million samples."""


def make(uri: str, samples: int, classes: int) -> None:
    """The files of a run that keep-lists are cut from."""
    run, draw = Run(uri), np.random.default_rng(0)
    storage.write_json(
        run.path("index", "classes.json"),
        {"names": [f"class-{number}" for number in range(classes)], "numeric": False},
    )
    centre = 0.5 * draw.standard_normal((classes, CLUSTERS, WIDTH), np.float32)
    directions = 0.5 * draw.standard_normal((INNER, WIDTH), np.float32) / INNER**0.5
    for shard, start in enumerate(range(0, samples, SHARD)):
        rows = min(SHARD, samples - start)
        label = draw.integers(classes, size=rows)
        vectors = centre[label, draw.integers(CLUSTERS, size=rows)]
        vectors += draw.standard_normal((rows, INNER), np.float32) @ directions
        vectors += 0.2 * draw.standard_normal((rows, WIDTH), np.float32)
        loss = draw.gamma(1, 1, rows).astype(np.float32)
        named = {
            "sample_id": pa.array([f"train-{shard:05d}.tar/{row:06d}" for row in range(rows)]),
            "label": pa.array(label, pa.int32()),
        }
        score = loss + 0.3 * draw.standard_normal(rows, np.float32)
        storage.write_table(
            run.path("scores", f"{shard:05d}.parquet"), pa.table(named | {"score": score})
        )
        embedding = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.astype(np.float16).reshape(-1)), WIDTH
        )
        storage.write_table(
            run.path("embeddings", f"{shard:05d}.parquet"),
            pa.table(named | {"embedding": embedding, "loss": loss}),
        )
    detail = {"measured": samples, "score": "loss"}
    run.write_ledger({"extrapolate": StageRecord(state="done", samples=samples, detail=detail)})
    run.write_config(parse_config({"run": uri, "source": {"uri": "x"}}))


def one(uri: str, strategy: str, keep: list[float], threads: int, whole: bool) -> None:
    """In a process of its own: write the lists once, and print what it took."""
    import torch

    torch.set_num_threads(threads)
    settings = SelectSettings(
        strategy=strategy,  # type: ignore[arg-type]
        keep=tuple(keep),
        by_class=False if whole else "auto",
    )
    wall, cpu = time.perf_counter(), time.process_time()
    make_keep_lists(Run(uri), settings, keep, TrustSettings())
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps(took | {"memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", default="100000,1000000", help="numbers with commas")
    parser.add_argument("--strategies", default=STRATEGIES, help="names with commas")
    parser.add_argument("--keep", default="0.3")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="over all samples, not by class")
    parser.add_argument("--dir", help="where the runs are kept")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep = [float(fraction) for fraction in arguments.keep.split(",")]
    if arguments.run:
        one(arguments.run, arguments.strategies, keep, arguments.threads, arguments.whole)
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads; {arguments.classes} classes, lists of "
        f"{arguments.keep}, {'over all samples' if arguments.whole else 'within classes'}"
    )
    print(f"{'samples':>10}  {'':<10}{'wall s':>10}{'cpu s':>10}{'MB':>10}")
    with tempfile.TemporaryDirectory() as own:
        for samples in map(int, arguments.samples.split(",")):
            uri = os.path.join(arguments.dir or own, f"{samples}-{arguments.classes}")
            if not os.path.exists(f"{uri}/run.json"):
                make(uri, samples, arguments.classes)
            for strategy in arguments.strategies.split(","):
                command = [sys.executable, __file__, "--run", uri, "--strategies", strategy]
                command += ["--keep", arguments.keep, "--threads", str(arguments.threads)]
                command += ["--whole"] * arguments.whole
                environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
                took = json.loads(
                    subprocess.run(
                        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
                    ).stdout
                )
                slow = took["cpu"] / arguments.threads > LIMIT_SECONDS * max(1, samples / 1e6)
                large = took["memory"] > LIMIT_BYTES
                print(
                    f"{samples:>10,}  {strategy:<10}{took['wall']:>10.1f}{took['cpu']:>10.1f}{took['memory'] / 1e6:>10.0f}"
                    f"{'  too slow' * slow}{'  too much memory' * large}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
