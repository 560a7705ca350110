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
import os
import platform
import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from keep_list_costs import Columns, columns_of_cost, cost_of, print_cost, write_run

from raypipe.config import SelectSettings

WIDTH, INNER, CLUSTERS = 128, 16, 8
SHARD = 20_000
"""Samples in a shard."""
STRATEGIES = "band,d2,infomax,coverage,typical"
LIMIT_SECONDS, LIMIT_BYTES = 600, 4e9
"""What a strategy may take for a million samples."""


def shards_of(samples: int, classes: int) -> Iterator[tuple[Columns, Columns, Columns]]:
    """Clustered embeddings, losses, and scores that follow them, shard by shard."""
    draw = np.random.default_rng(0)
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
        values = pa.array(vectors.astype(np.float16).reshape(-1))
        embedding = pa.FixedSizeListArray.from_arrays(values, WIDTH)
        yield named, {"score": pa.array(score)}, {"embedding": embedding, "loss": pa.array(loss)}


def print_cost_with_threads(
    uri: str, strategy: str, keep: list[float], threads: int, whole: bool
) -> None:
    import torch

    torch.set_num_threads(threads)
    settings = SelectSettings(
        strategy=strategy,  # type: ignore[arg-type]
        keep=tuple(keep),
        by_class=False if whole else "auto",
    )
    print_cost(uri, settings)


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
        print_cost_with_threads(
            arguments.run, arguments.strategies, keep, arguments.threads, arguments.whole
        )
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
                shards = shards_of(samples, arguments.classes)
                write_run(uri, arguments.classes, "loss", shards)
            for strategy in arguments.strategies.split(","):
                options = ["--run", uri, "--strategies", strategy, "--keep", arguments.keep]
                options += ["--threads", str(arguments.threads)]
                options += ["--whole"] * arguments.whole
                took = cost_of(__file__, *options, threads=arguments.threads)
                slow = took["cpu"] / arguments.threads > LIMIT_SECONDS * max(1, samples / 1e6)
                large = took["memory"] > LIMIT_BYTES
                print(
                    f"{samples:>10,}  {strategy:<10}{columns_of_cost(took)}"
                    f"{'  too slow' * slow}{'  too much memory' * large}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
