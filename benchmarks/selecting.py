"""What keep-lists cost: seconds, processor seconds and memory of `write_keep_lists`, on synthetic scores and losses on the local disk.

    python benchmarks/selecting.py [--samples 10000000] [--shards 1000] [--classes 1000] [--strategies top,ccs,...] [--keep 0.3,0.5]

Each strategy in a process of its own; memory is the most that it had, of which an import takes part. Scores and losses are random; the
files of a size are made once and kept where --dir is given.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from keep_list_costs import Columns, columns_of_cost, cost_of, print_cost, write_run

from raypipe.config import SelectSettings
from raypipe.selection import STRATEGIES


def shards_of(
    samples: int, shards: int, classes: int
) -> Iterator[tuple[Columns, Columns, Columns]]:
    """Random scores and losses, shard by shard."""
    draw = np.random.default_rng(0)
    for shard, rows in enumerate(np.array_split(np.arange(samples), shards)):
        ids = pa.array([f"train-{shard:05d}.tar/{row:09d}" for row in rows.tolist()], pa.string())
        label = pa.array(draw.integers(classes, size=len(rows)), pa.int32())
        score, loss = (pa.array(draw.normal(size=len(rows)).astype(np.float32)) for _ in range(2))
        yield {"sample_id": ids, "label": label}, {"score": score}, {"loss": loss}


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
        settings = SelectSettings(
            strategy=arguments.strategies,
            keep=tuple(keep),
            by_class=arguments.by_class or "auto",
        )
        print_cost(arguments.run, settings)
        return
    with tempfile.TemporaryDirectory() as own:
        uri = os.path.join(
            arguments.dir or own, f"{arguments.samples}-{arguments.shards}-{arguments.classes}"
        )
        if not os.path.exists(f"{uri}/run.json"):
            shards = shards_of(arguments.samples, arguments.shards, arguments.classes)
            write_run(uri, arguments.classes, "moso", shards)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores; {arguments.samples:,} samples in {arguments.shards:,} shards, "
            f"{arguments.classes:,} classes{', within classes' * arguments.by_class}; lists of {arguments.keep}"
        )
        print(f"{'':<12}{'wall s':>10}{'cpu s':>10}{'MB':>10}")
        for strategy in arguments.strategies.split(","):
            options = ["--run", uri, "--strategies", strategy, "--keep", arguments.keep]
            took = cost_of(__file__, *options, *["--by-class"] * arguments.by_class)
            print(f"{strategy:<12}{columns_of_cost(took)}", flush=True)


if __name__ == "__main__":
    main()
