"""Run functions that report their steps in concurrent Ray tasks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray

from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.usage import Stopwatch
from raypipe.progress import ProgressCallback
from raypipe.runs.run import Run
from raypipe.storage.fences import fenced

StepFunction = Callable[[Config, Run, int, ProgressCallback], None]


def run_step_functions(
    context: Context, parts: dict[str, StepFunction], samples: int, cpus: int = 1, gpus: int = 0
) -> float:
    """Run functions concurrently, each in a task, and show their joint progress.

    Parameters
    ----------
    context : Context
        Configuration and run are passed to the functions.
    parts : dict of str to callable
        The functions by name. Each is called with (config, run, samples, step), where step reports
        steps done and in total.
    samples : int
        Passed to the functions.
    cpus, gpus : int
        Share of a machine of each task. A task has as many threads as CPUs.

    Returns
    -------
    float
        Processor seconds.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_in_task).options(
        num_returns="streaming"
    )
    streams = {
        name: task.remote(fenced(part), context.config, context.run.uri, samples, cpus)
        for name, part in parts.items()
    }
    done, totals, seconds = (
        dict.fromkeys(parts, 0),
        dict.fromkeys(parts, 0),
        dict.fromkeys(parts, 0.0),
    )
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
    with context.progress.meter(
        "+".join(dict.fromkeys(name.partition("-")[0] for name in parts)), 0, "epochs"
    ) as meter:
        while running:
            name, step = steps.get()
            if isinstance(step, Exception):
                raise as_raypipe_error(step) from step
            if step is None:
                running.remove(name)
                continue
            done[name], totals[name], seconds[name] = step
            meter.expect(sum(totals.values()))
            meter.add(sum(done.values()) - meter.count)
    return sum(seconds.values())


def _in_task(
    part: StepFunction, config: Config, run_uri: str, samples: int, threads: int
) -> Iterator[tuple[int, int, float]]:
    """Yield (steps done, steps in total, processor seconds) while the function runs in a thread.

    Runs in a task.
    """
    from raypipe.vision.devices import set_threads

    watch = Stopwatch()
    steps: queue.Queue[tuple[int, int] | BaseException | None] = queue.Queue()

    def work() -> None:
        set_threads(threads)
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
