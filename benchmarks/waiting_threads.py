"""What OpenMP's waiting costs: steps of two torch threads on an idle machine and next to a busy process, by GOMP_SPINCOUNT.

    python benchmarks/waiting_threads.py [--spins default,0,1000,10000,100000] [--threads 2] [--neighbours 0,1] [--rounds 5]

A thread that reaches the end of a parallel region spins until the others arrive. If something else uses their core, that is lost. Each policy runs
in a process of its own, since libgomp reads the variable when it is loaded; rounds alternate between the policies. Prints the medians over the
rounds of wall and processor seconds: a training step of `small` (32 images of 32 pixels), a forward pass (256 images), and a ridge regression with
float64 (2,000 samples, 300 features, Cholesky).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

TASKS = ("training step", "forward pass", "ridge fit")
REPETITIONS = {"training step": 15, "forward pass": 8, "ridge fit": 20}

BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
"""A process that is busy until this one ends."""


def measure(threads: int) -> dict[str, tuple[float, float]]:
    """Wall and processor seconds of each task, each the mean over its repetitions."""
    import torch
    import torch.nn.functional as F

    from raypipe.proxies.networks import build_network

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build_network("small", 10, 32).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    few, many = (torch.randn(count, 3, 32, 32).contiguous(memory_format=torch.channels_last) for count in (32, 256))  # fmt: skip
    label = torch.arange(32) % 10
    features = torch.randn(2000, 300, dtype=torch.float64)
    target = torch.randn(2000, 1, dtype=torch.float64)

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model.train()(few), label).backward()
        optimizer.step()

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(many)

    def fit() -> None:
        gram = features.T @ features + torch.eye(300, dtype=torch.float64)
        torch.cholesky_solve(features.T @ target, torch.linalg.cholesky(gram))

    work: dict[str, Callable[[], None]] = dict(zip(TASKS, (train, forward, fit), strict=True))
    return {name: _seconds(task, REPETITIONS[name]) for name, task in work.items()}


def _seconds(task: Callable[[], None], repetitions: int) -> tuple[float, float]:
    for _ in range(3):
        task()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repetitions):
        task()
    return (time.perf_counter() - wall) / repetitions, (time.process_time() - cpu) / repetitions


def in_process(spins: str, threads: int) -> dict[str, tuple[float, float]]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    }
    if spins != "default":
        environment["GOMP_SPINCOUNT"] = spins
    command = [sys.executable, __file__, "--threads", str(threads), "--measure"]
    return json.loads(subprocess.check_output(command, env=environment))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spins", default="default,0,1000,10000,100000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--neighbours", default="0,1", help="busy processes next to it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.threads)))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, {arguments.rounds} rounds"
    )
    for neighbours in map(int, arguments.neighbours.split(",")):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(neighbours)]
        try:
            results: dict[str, list[dict[str, tuple[float, float]]]] = {}
            for _ in range(arguments.rounds):
                for spins in arguments.spins.split(","):
                    results.setdefault(spins, []).append(in_process(spins, arguments.threads))
        finally:
            for process in busy:
                process.kill()
        print(f"\n{neighbours} busy processes; milliseconds, wall / processor\n")
        print(f"{'GOMP_SPINCOUNT':<16}" + "".join(f"{name:>20}" for name in TASKS))
        for spins, rounds in results.items():
            cells = [
                " / ".join(f"{1000 * statistics.median(r[name][kind] for r in rounds):.0f}" for kind in (0, 1))
                for name in TASKS
            ]  # fmt: skip
            print(f"{spins:<16}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
