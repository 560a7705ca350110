"""Run functions that report their steps in concurrent Ray tasks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import ray

from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.spot import training_labels
from raypipe.distributed.usage import Stopwatch
from raypipe.progress import ProgressCallback
from raypipe.runs.run import Run
from raypipe.storage.fences import fenced

StepFunction = Callable[[Config, Run, int, ProgressCallback], None]
"""Does its work given (config, run, samples, step), and calls step(done, total) as it proceeds."""


SHOWN_STEPS = 100
"""Steps that the progress shows for each of several functions, however many it takes."""


class StepReport(NamedTuple):
    """Progress of one function: steps done, steps in total, processor seconds so far."""

    done: int = 0
    total: int = 0
    seconds: float = 0.0

    @property
    def shown(self) -> int:
        """Steps done, if all of them were `SHOWN_STEPS`."""
        return SHOWN_STEPS * self.done // self.total if self.total else 0


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
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        label_selector=training_labels(context.config.cluster),
        max_retries=3,
        num_returns="streaming",
    )(_in_task)
    streams = {
        name: task.remote(fenced(part), context.config, context.run.uri, samples, cpus)
        for name, part in parts.items()
    }
    messages: queue.Queue[tuple[str, StepReport | Exception | None]] = queue.Queue()
    for name, stream in streams.items():
        threading.Thread(target=_follow, args=(name, stream, messages), daemon=True).start()
    running, latest = set(parts), dict.fromkeys(parts, StepReport())
    # several functions report their totals one by one, so each counts for the same number of steps
    alone = len(parts) == 1
    title = next(iter(parts)).partition("-")[0] if alone else "fit"
    total, unit = (0, "epochs") if alone else (SHOWN_STEPS * len(parts), "steps")
    with context.progress.meter(title, total, unit) as meter:
        while running:
            name, message = messages.get()
            if isinstance(message, Exception):
                raise as_raypipe_error(message) from message
            if message is None:
                running.remove(name)
                continue
            latest[name] = message
            if alone:
                meter.expect(message.total)
            done = message.done if alone else sum(report.shown for report in latest.values())
            meter.add(done - meter.count)
    return sum(report.seconds for report in latest.values())


def _follow(
    name: str,
    stream: Iterable[ray.ObjectRef],
    messages: queue.Queue[tuple[str, StepReport | Exception | None]],
) -> None:
    """Pass on the reports of a task, then None or its error. Runs in a thread of the driver."""
    try:
        for reference in stream:
            messages.put((name, ray.get(reference)))
        messages.put((name, None))
    except Exception as error:
        messages.put((name, error))


def _in_task(
    part: StepFunction, config: Config, run_uri: str, samples: int, threads: int
) -> Iterator[StepReport]:
    """Yield reports while the function runs in a thread. Runs in a task."""
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
        yield StepReport(done, total, seconds)
    yield StepReport(done, total, seconds + watch.lap())
