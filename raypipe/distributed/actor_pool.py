"""Stream units of work through Ray: by a Ray Data pipeline (read -> actor pool), or by tasks.

A unit (a fragment or a seed shard) is one block, and the unit of retry. The worker that computes a
unit writes its file and returns only counts, so that the driver never holds data.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, TaskPoolStrategy
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask

from raypipe.config import Config
from raypipe.distributed.cluster import ActorPool, PoolSize
from raypipe.distributed.context import Context
from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.pending import requesting, resource_shape
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult
from raypipe.storage.fences import fenced

Batch = dict[str, np.ndarray]
"""Columns of equal length, one row per sample."""

Actor = Callable[[str, Batch], UnitResult]
"""Processes one unit, given its name and its rows; a unit can have no rows."""

UNIT, EMPTY = "raypipe_unit", "raypipe_empty"
"""Columns of every block: the name of its unit, and whether its only row is a placeholder."""


@dataclass(frozen=True)
class WorkerContext:
    """The run that an actor works for, and its share of a machine.

    Attributes
    ----------
    config : Config
        The configuration of the run.
    run_uri : str
        The run folder.
    threads : int
        Torch threads of the worker.
    gpu : bool
        Whether the worker has a GPU, or a share of one.
    """

    config: Config
    run_uri: str
    threads: int
    gpu: bool

    @classmethod
    def of(cls, context: Context, pool: ActorPool) -> WorkerContext:
        """Return the context of the workers of a pool."""
        return cls(context.config, context.run.uri, pool.threads, pool.num_gpus > 0)

    @property
    def run(self) -> Run:
        """The run."""
        return Run(self.run_uri)

    @property
    def device(self) -> str:
        """The torch device: "cuda" or "cpu"."""
        return "cuda" if self.gpu else "cpu"


def stream(
    units: Sequence[Any],
    read: Callable[[Any], Batch],
    make_actor: Callable[[], Actor],
    pool: ActorPool,
    patience: float,
    on_result: Callable[[UnitResult], None],
    *,
    units_per_actor: int = 1,
    name: Callable[[Any], str] = str,
) -> None:
    """Read every unit in a task, process it in a pool of actors, and pass the results on.

    Parameters
    ----------
    units
        What to work on.
    read
        unit -> its rows. Runs in a task. Without a GPU, tasks and actors request the same
        resources, and Ray Data fuses them: every actor then reads its own units, and nothing is
        copied in between.
    make_actor
        Creates an actor in its own process.
    pool
        Size of the pool and the share of a machine that each actor takes.
    patience
        Seconds without any result after which the stream gives up.
    on_result
        Called in the driver with the result of each unit.
    units_per_actor
        Units that justify the start of another actor.
    name
        unit -> its name.

    Raises
    ------
    StageError
        If user code fails, no unit finishes for `patience` seconds, or workers keep dying.
    """
    if not units:
        return
    size = pool.sizes(len(units), units_per_actor)
    with DataContext.current(_data_context(patience)):
        dataset = ray.data.read_datasource(
            _Units(units, fenced(read), name),
            override_num_blocks=len(units),
            num_cpus=pool.read_cpus,
            concurrency=size.maximum if pool.tasks else None,
        )
        # map_batches refuses whole blocks with a GPU, and with a batch size would merge units
        dataset = dataset.map_batches_internal(
            batch_size=None,
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            **_compute_options(make_actor, pool, size),
        )
        try:
            with requesting(
                resource_shape(pool.num_cpus, pool.num_gpus), resource_shape(pool.read_cpus)
            ):
                for batch in dataset.iter_batches(
                    batch_size=None, batch_format="numpy", prefetch_batches=0
                ):
                    for row in range(len(batch["unit"])):
                        on_result(UnitResult.from_batch(batch, row))
        except Exception as error:
            raise as_raypipe_error(error) from error


def _data_context(patience: float) -> DataContext:
    """Return Ray Data's settings for a stream."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # a unit stays one block; source.fragment_samples bounds its size
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = patience
    return context


def _compute_options(
    make_actor: Callable[[], Actor], pool: ActorPool, size: PoolSize
) -> dict[str, Any]:
    """Return the arguments of `map_batches` for actors, or for tasks in their place."""
    make = fenced(make_actor)
    if pool.tasks:
        return {
            "fn": _as_actor,
            "fn_kwargs": {"key": uuid.uuid4().hex, "make": make},
            "compute": TaskPoolStrategy(size.maximum),
        }
    return {
        "fn": _Actor,
        "fn_constructor_kwargs": {"make": make},
        "compute": ActorPoolStrategy(
            min_size=size.minimum,
            max_size=size.maximum,
            initial_size=size.initial,
            max_tasks_in_flight_per_actor=2,
        ),
    }


class _Actor:
    """An actor that is created in the process where it works, with the fences of the driver."""

    def __init__(self, make: Callable[[], Actor]) -> None:
        self._actor = make()

    def __call__(self, batch: Batch) -> Batch:
        return _work(self._actor, batch)


_current: tuple[str, Actor | None] = ("", None)
"""Key of a stream, and its actor in this process, while tasks do the work of actors."""


def _as_actor(batch: Batch, key: str, make: Callable[[], Actor]) -> Batch:
    """Do the work of an actor in a task; the actor is created once per process and stream."""
    global _current
    if _current[0] != key:
        _current = ("", None)  # free the old actor before the new one is created
        _current = (key, make())
    assert _current[1] is not None
    return _work(_current[1], batch)


def _work(actor: Actor, batch: Batch) -> Batch:
    rows = 0 if batch[EMPTY][0] else len(batch[EMPTY])
    columns = {name: column[:rows] for name, column in batch.items() if name not in (UNIT, EMPTY)}
    return actor(str(batch[UNIT][0]), columns).as_batch()


class _Units(Datasource):
    """A Ray Data source with one read task per unit."""

    def __init__(
        self, units: Sequence[Any], read: Callable[[Any], Batch], name: Callable[[Any], str]
    ) -> None:
        self._units, self._read, self._name = units, read, name

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(_Reader(self._read, unit, self._name(unit)), metadata) for unit in self._units
        ]


class _Reader:
    """Reads one unit into one block.

    Ray Data drops blocks without rows, so an empty unit gets a placeholder row.
    """

    def __init__(self, read: Callable[[Any], Batch], unit: Any, name: str) -> None:
        self._read, self._unit, self._name = read, unit, name

    def __call__(self) -> Iterable[pa.Table]:
        columns = self._read(self._unit)
        rows = len(next(iter(columns.values())))
        if not rows:
            columns = {
                name: np.zeros((1, *column.shape[1:]), column.dtype)
                for name, column in columns.items()
            }
        count = max(1, rows)
        marks = {UNIT: np.full(count, self._name), EMPTY: np.full(count, not rows)}
        return [BlockAccessor.batch_to_block(columns | marks)]
