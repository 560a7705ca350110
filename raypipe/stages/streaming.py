"""Fragments through Ray: as a Ray Data pipeline (read -> actor pool), or as plain tasks where there is no network to keep.

One unit (a fragment or a seed shard) is one block and one unit of retry. Whoever computes a unit writes its file and
passes on only a line of counts, so the driver never holds data.
"""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, TaskPoolStrategy
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask
from ray.train import TrainingFailedError

from raypipe import errors
from raypipe.errors import MemoryShortageError, RaypipeError, StageError
from raypipe.stages.cluster import Pool
from raypipe.stages.demand import asking, shape
from raypipe.storage.fences import fenced

Columns = dict[str, np.ndarray]
LOOK_AGAIN = 5.0
"""Seconds after which the CPUs of the cluster are counted again."""


def stream(
    units: Sequence[Any],
    read: Callable[[Any], Columns],
    actor: type,
    actor_arguments: dict[str, Any],
    pool: Pool,
    patience: float,
    on_result: Callable[[dict[str, Any]], None],
    worth: int = 1,
) -> None:
    """Read every unit in a task, hand it to a pool of actors that grows between its bounds, pass their results on.

    read    unit -> columns of equal length; runs in a task, beside the actors. Without a GPU both ask for the same resources, and Ray Data
            joins them: every actor then reads for itself, and nothing is copied in between
    actor   class whose instances take those columns and return columns of length 1, a result
    worth   units that are worth the start of another actor
    Raises StageError when user code fails, when nothing moves for `patience` seconds, or when workers keep dying.
    """
    if not units:
        return
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # a unit stays one block; its size is bounded by source.fragment_samples
    context.execution_no_progress_timeout_s = patience
    least, start, most = pool.sizes(len(units), worth)
    made = {"make": fenced(actor), "arguments": actor_arguments}
    how: dict[str, Any] = {"fn": _Actor, "fn_constructor_kwargs": made}
    how["compute"] = ActorPoolStrategy(min_size=least, max_size=most, initial_size=start, max_tasks_in_flight_per_actor=2)
    if pool.tasks:
        how = {"fn": _as_actor, "fn_kwargs": {"key": uuid.uuid4().hex, **made}, "compute": TaskPoolStrategy(most)}
    with DataContext.current(context):
        dataset = ray.data.read_datasource(
            _Units(units, fenced(read)),
            override_num_blocks=len(units),
            num_cpus=pool.read_cpus,
            concurrency=most if pool.tasks else None,
        )
        # map_batches refuses whole blocks with a GPU, and with a batch size would put units together
        dataset = dataset.map_batches_internal(batch_size=None, num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, **how)
        try:
            with asking(shape(pool.num_cpus, pool.num_gpus), shape(pool.read_cpus)):
                for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                    for row in range(len(batch["unit"])):
                        on_result({key: _plain(column[row]) for key, column in batch.items()})
        except Exception as error:
            raise failure(error) from error


class _Actor:
    """An actor of another class, made where the fences of the driver stand."""

    def __init__(self, make: Callable[..., Callable[[Columns], Columns]], arguments: dict[str, Any]) -> None:
        self._actor = make(**arguments)

    def __call__(self, batch: Columns) -> Columns:
        return self._actor(batch)


_kept: tuple[str, Callable[[Columns], Columns] | None] = ("", None)


def _as_actor(batch: Columns, key: str, make: Callable[..., Callable[[Columns], Columns]], arguments: dict[str, Any]) -> Columns:
    """What an actor does, by one that is made once in each process that has tasks of a stream with this key."""
    global _kept
    if _kept[0] != key:
        _kept = ("", None)  # before there is another
        _kept = (key, make(**arguments))
    assert _kept[1] is not None
    return _kept[1](batch)


class _Units(Datasource):
    """A Ray Data source with one read task per unit."""

    def __init__(self, units: Sequence[Any], read: Callable[[Any], Columns]) -> None:
        self._units, self._read = units, read

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Reader(self._read, unit), metadata) for unit in self._units]


class _Reader:
    def __init__(self, read: Callable[[Any], Columns], unit: Any) -> None:
        self._read, self._unit = read, unit

    def __call__(self) -> Iterable[pa.Table]:
        return [BlockAccessor.batch_to_block(self._read(self._unit))]


def run_tasks(
    units: Iterable[Any],
    function: Callable[[Any], dict[str, Any]],
    on_result: Callable[[dict[str, Any]], None],
    *,
    num_cpus: float = 1,
    in_flight: int | None = None,
) -> None:
    """Run a function on every unit in Ray tasks, retried when a worker dies; few are queued, so the driver stays small.

    What is queued beyond the CPUs is what an autoscaler sees, and grows with the nodes that it brings.
    """
    remote = ray.remote(num_cpus=num_cpus, max_retries=-1)(_call)
    shared = ray.put(fenced(function))
    limit, looked = in_flight or 0, -math.inf
    waiting: list[Any] = []
    queue = iter(units)
    exhausted = False
    while True:
        if in_flight is None and not exhausted and time.monotonic() - looked > LOOK_AGAIN:
            limit, looked = max(4, int(4 * ray.cluster_resources().get("CPU", 0) / max(num_cpus, 0.1))), time.monotonic()
        while not exhausted and len(waiting) < limit:
            try:
                waiting.append(remote.remote(shared, next(queue)))
            except StopIteration:
                exhausted = True
        if not waiting:
            return
        try:
            with asking(shape(num_cpus)):
                ready, waiting = ray.wait(waiting)
            for result in ray.get(ready):
                on_result(result)
        except Exception as error:
            raise failure(error) from error


def _call(function: Callable[[Any], dict[str, Any]], unit: Any) -> dict[str, Any]:
    return function(unit)


def failure(error: BaseException) -> Exception:
    """Ray's long error as one of ours with the line that matters. An error of ours raised in a worker stays what it is.

    MemoryShortageError where memory was the reason.
    """
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        of_training = [*getattr(link, "worker_failures", {}).values(), getattr(link, "controller_failure", None)]
        link = getattr(link, "cause", None) or of_training[0] or link.__cause__
    for link in seen:
        # what Ray makes of an error is of its class as well, but not made as it is
        if isinstance(link, RaypipeError) and not isinstance(link, ray.exceptions.RayError):
            return type(link)(str(link))
    for link in seen:  # Ray Data keeps of an actor's error its text alone
        if ours := re.findall(r"^\s*raypipe\.(?:\w+\.)+(\w+): (.+)", str(link), re.MULTILINE):
            return getattr(errors, ours[-1][0], StageError)(ours[-1][1])
    for link in seen:
        if _of_memory(link):
            said = " ".join(str(link).split())
            return MemoryShortageError(f"workers ran out of memory ({said[:300] or type(link).__name__})")
    if any(type(link).__name__ == "ExecutionTimeoutError" for link in seen):
        return StageError(
            "nothing was finished for cluster.patience_seconds: workers wait for machines, or die again and again (too little memory, a crash "
            "in a library), of which Ray's logs tell; run again to resume"
        )
    # Ray Data ends its chains with an empty SystemException or with what it calls every error of an actor
    texts = [f"{type(link).__name__}: {link}" for link in seen if type(link).__name__ != "SystemException" and str(link)]
    for text in reversed(texts):
        lines = [line.strip() for line in text.splitlines() if re.match(r"\s*[\w.]*(Error|Exception|Interrupt): .", line)]
        if lines := [line for line in lines if not re.match(r"(ray\.exceptions\.)?(UserCodeException|RayTaskError)\b", line)]:
            return StageError(lines[-1][:600])
    return StageError(" ".join((texts[-1] if texts else type(error).__name__).split())[:600])


def _of_memory(error: BaseException) -> bool:
    """Whether memory was the reason. Ray names it among others that are possible where a worker just vanished: that does not count."""
    if isinstance(error, MemoryError | ray.exceptions.OutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    if isinstance(error, ray.exceptions.RayTaskError):  # whose text is a traceback
        return re.search(r"^\s*[\w.]*(MemoryError|OutOfMemoryError): ", str(error), re.MULTILINE) is not None
    if not isinstance(error, ray.exceptions.RayError | TrainingFailedError):
        return False
    return re.search(r"running low on memory|NODE_OUT_OF_MEMORY|CUDA out of memory|\bMemoryError\b", str(error)) is not None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


class Stopwatch:
    """Processor seconds of this process since the last look."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        now = time.process_time()
        spent, self._last = now - self._last, now
        return spent
