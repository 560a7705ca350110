"""What a Ray worker costs before it works, with and without `cluster.preload`.

    python benchmarks/worker_start.py [--workers 6]

Each mode runs in a process of its own. It starts a cluster as a run does, and then actors that import what training workers import, one after the
other. Prints for each mode the wall seconds until the first actor answers and, as medians over the others, their wall and processor seconds and the
memory that they share with no other process (USS). Then demo runs (`raypipe demo`), alternating, with
wall and processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import psutil

MODES = {"import in every worker": False, "forked (cluster.preload)": True}


class Importer:
    """An actor that imports what training workers import."""

    def cost(self) -> tuple[float, float]:
        """Memory in MiB and processor seconds of this process."""
        import ray.train.torch  # noqa: F401
        import torch  # noqa: F401

        import raypipe.stages.proxy.worker  # noqa: F401

        process = psutil.Process()
        return process.memory_full_info().uss / 2**20, sum(process.cpu_times()[:2])


def measure(preload: bool, workers: int) -> dict[str, float]:
    from raypipe.config import ClusterSettings
    from raypipe.distributed.cluster import connect
    from raypipe.progress import Progress
    from raypipe.runs.run import Run

    settings = ClusterSettings(address="local", preload=preload)
    connect(settings, Run("unused"), Progress(quiet=True), verbose=False)
    import ray

    seconds, costs = list[float](), list[tuple[float, float]]()
    actor = ray.remote(Importer)
    for _ in range(workers):
        start = time.perf_counter()
        one = actor.remote()
        costs.append(ray.get(one.cost.remote()))
        seconds.append(time.perf_counter() - start)
        ray.kill(one)
    memory, processor = (statistics.median(column) for column in zip(*costs[1:], strict=True))
    others = statistics.median(seconds[1:])
    return {"first": seconds[0], "others": others, "processor": processor, "MiB": memory}


def demo(preload: bool) -> tuple[float, float]:
    """Wall and processor seconds of a demo run."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "raypipe", "demo", "--run", f"{folder}/run"]
        command += ["--set", f"cluster.preload={str(preload).lower()}"]
        # all processes of the cluster end with the command, as its descendants
        watched = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        last: dict[int, float] = {}
        while watched.poll() is None:
            for process in [watched, *watched.children(recursive=True)]:
                try:
                    last[process.pid] = sum(process.cpu_times()[:2])
                except psutil.Error:
                    continue
            time.sleep(0.2)
        return time.perf_counter() - start, sum(last.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--demos", type=int, default=3)
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(MODES[options.measure], options.workers)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n")
    for mode in MODES:
        command = [sys.executable, __file__, "--workers", str(options.workers), "--measure", mode]
        result = json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))
        print(
            f"{mode:26} first actor {result['first']:5.2f} s, others {result['others']:5.2f} s "
            f"({result['processor']:4.2f} processor s, {result['MiB']:4.0f} MiB) each"
        )
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for _ in range(options.demos):
        for mode, preload in MODES.items():
            seconds[mode].append(demo(preload))
    print()
    for mode, pairs in seconds.items():
        wall, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{mode:26} demo {wall:5.1f} s, {processor:5.1f} processor s (median of {len(pairs)})"
        )


if __name__ == "__main__":
    main()
