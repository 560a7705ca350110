"""Time of the trajectory scores beside the time of reading the trajectory from disk.

    python benchmarks/trajectories.py [--quick] [--dir FOLDER] [--seed 0]

Two trajectories are written as the proxy stage of one worker writes them (the second takes 4 GB): 50,000 samples of 10 classes over 50
epochs, and 256,000 samples of 1,000 classes over 10 epochs; --quick takes a tenth of the samples. Then, on one core:

- "arrays only": the probabilities alone, row group by row group for all epochs as the measure stage reads, nothing done with them;
- "for each score" what `score_rows` of the measure stage takes: it reads the columns that the score declares, and computes;
- "all scores": the eight of them from one reading of all columns.

"read" is the time of reading the same columns and doing nothing with them; "compute" is the difference, which includes turning float16
into float32; the two take turns. Every score has its default options, but for Dynamic Uncertainty a window of 5 where there are 10
epochs. Times are processor seconds of this process, which is the wall-clock time of an idle core: the files were just written or read, so
the page cache holds them as far as memory allows, and no disk is measured. The wall-clock time of the totals stands beside them, and is
longer where the machine has other work. The peak is the highest memory of this process (RSS) above that at its start, with everything
imported but nothing read.

Made predictions move as those of a network that learns do: logits walk towards the label, some samples back and forth.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pyarrow as pa
import torch

from raypipe import storage
from raypipe.runs.manifests import ProxyManifest, ProxyOfPart, TrainedProxy
from raypipe.runs.run import Run
from raypipe.scores.registry import SCORES
from raypipe.scores.trajectory import STATISTICS
from raypipe.stages.measure.trajectories import columns_of, read_groups, score_rows
from raypipe.stages.proxy.predictions import group_rows, predictions, write_trajectory

CASES = ((50_000, 10, 50), (256_000, 1_000, 10))
"""Samples, classes, epochs."""

BATCH = 8192


def write(run: Run, samples: int, classes: int, epochs: int, seed: int) -> np.ndarray:
    """Write a trajectory; its labels."""
    torch.set_num_threads(1)
    random = np.random.default_rng(seed)
    label = random.integers(0, classes, samples)
    pace = random.lognormal(0, 1, samples).astype(np.float32)
    noise = torch.Generator().manual_seed(seed)
    files = []
    for epoch in range(epochs):
        predicted = []
        for first in range(0, samples, BATCH):
            rows = np.arange(first, min(first + BATCH, samples))
            logits = torch.randn(len(rows), classes, generator=noise)
            towards = torch.from_numpy(8 * np.tanh(pace[rows] * (epoch + 1) / epochs))
            logits[torch.arange(len(rows)), torch.from_numpy(label[rows])] += towards
            predicted.append(predictions(rows, 2 * logits, torch.from_numpy(label[rows])))
        files.append([f"epoch-{epoch:04d}-0-of-1.parquet"])
        uri = run.path("proxy", "trajectory", files[-1][0])
        write_trajectory(uri, predicted, group_rows(classes, epochs, 1))
    trained = TrainedProxy(epochs, epochs, tuple(map(tuple, files)), (), "")
    parts = (ProxyOfPart(samples, (samples,), trained),)
    ProxyManifest("small", classes, 8, (), (), samples, 0, parts).write(run)
    return label


class Memory:
    """Highest RSS of this process."""

    def __enter__(self) -> Memory:
        process, self._over = psutil.Process(), threading.Event()
        self.peak = process.memory_info().rss

        def watch() -> None:
            while not self._over.wait(0.01):
                self.peak = max(self.peak, process.memory_info().rss)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measure(actions: list[Callable[[], Any]], repeats: int) -> tuple[list[float], float, float]:
    """Least processor seconds of each, taken in turn; wall-clock seconds of the last at its least; highest bytes."""
    best, wall = [float("inf")] * len(actions), 0.0
    with Memory() as memory:
        for _ in range(repeats):
            for index, action in enumerate(actions):
                started, clock = time.process_time(), time.perf_counter()
                action()
                spent, passed = time.process_time() - started, time.perf_counter() - clock
                if spent < best[index]:
                    best[index] = spent
                    wall = passed if index == len(actions) - 1 else wall
    return best, wall, memory.peak


def read(run: Run, samples: int, columns: list[str]) -> None:
    for _ in read_groups(run, 0, samples, columns):
        pass


def compare(run: Run, label: np.ndarray, epochs: int, repeats: int, base: int) -> None:
    samples = len(label)
    names = [name for name, info in SCORES.items() if info.needs == "trajectory"]
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    options["dynamic-uncertainty"] = {"window": 10 if epochs > 10 else 5}
    score_rows(run, 0, min(samples, 1000), label[:1000], options)  # what is imported on first use
    [arrays], wall, peak = measure([lambda: read(run, samples, ["probabilities"])], repeats)
    print(
        f"{'':<21}{'read s':>8}{'compute s':>11}{'total s':>9}{'wall s':>9}{'compute/read':>14}{'total/arrays':>14}{'peak MiB':>10}"
    )

    def line(title: str, reading: float, compute: str, total: float, ratio: str) -> None:
        print(
            f"{title:<21}{reading:>8.3f}{compute:>11}{total:>9.3f}{wall:>9.3f}{ratio:>14}{total / arrays:>14.2f}"
            f"{(peak - base) / 2**20:>10.0f}",
            flush=True,
        )

    line("arrays only", arrays, "", arrays, "")
    for title, scores in [*((name, [name]) for name in names), ("all scores", names)]:
        columns, chosen = columns_of(scores), {name: options[name] for name in scores}
        [reading, total], wall, peak = measure(
            [
                functools.partial(read, run, samples, columns),
                functools.partial(score_rows, run, 0, samples, label, chosen),
            ],
            repeats,
        )
        line(title, reading, f"{total - reading:.3f}", total, f"{(total - reading) / reading:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir",
        help="where the trajectories are written, and deleted again; default: a temporary folder",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="the least time of so many counts")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    base = psutil.Process().memory_info().rss
    print(
        f"{platform.machine()}, 1 thread of {os.cpu_count()} cores; torch {torch.__version__}, numpy {np.__version__}, "
        f"pyarrow {pa.__version__}; seed {arguments.seed}, least of {arguments.repeats}, page cache warm"
    )
    for samples, classes, epochs in CASES:
        samples //= 10 if arguments.quick else 1
        size = samples * epochs * (2 * classes + 4 * (2 + len(STATISTICS)))
        folder = tempfile.mkdtemp(prefix="raypipe-trajectories-", dir=arguments.dir)
        try:
            if shutil.disk_usage(folder).free < 1.2 * size:
                sys.exit(
                    f"{folder} has no room for {size / 1e9:.1f} GB; name another folder with --dir"
                )
            run = Run(folder)
            started = time.perf_counter()
            with ProcessPoolExecutor(
                1, mp_context=get_context("spawn")
            ) as other:  # its memory is not ours
                label = other.submit(write, run, samples, classes, epochs, arguments.seed).result()
            written = time.perf_counter() - started
            stored = sum(file.size for file in storage.listing(run.path("proxy", "trajectory")))
            print(
                f"\n{samples:,} samples x {classes:,} classes x {epochs} epochs: float16 arrays of "
                f"{2 * samples * classes * epochs / 1e6:,.0f} MB, on disk with the numbers {stored / 1e6:,.0f} MB; "
                f"made and written in {written:.0f} s"
            )
            compare(run, label, epochs, arguments.repeats, base)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
