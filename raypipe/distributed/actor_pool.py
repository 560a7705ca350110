"""Fragments through Ray: as a Ray Data pipeline (read -> actor pool), or as plain tasks where there is no network to keep.

One unit (a fragment or a seed shard) is one block and one unit of retry. Whoever computes a unit writes its file and
passes on only a line of counts, so the driver never holds data.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, TaskPoolStrategy
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask

from raypipe.distributed.cluster import ActorPool
from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.pending import requesting, resource_shape
from raypipe.storage.fences import fenced

Batch = dict[str, np.ndarray]


def stream(
    units: Sequence[Any],
    read: Callable[[Any], Batch],
    actor: type,
    actor_arguments: dict[str, Any],
    pool: ActorPool,
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
    context.target_max_block_size = (
        None  # a unit stays one block; its size is bounded by source.fragment_samples
    )
    context.execution_no_progress_timeout_s = patience
    least, start, most = pool.sizes(len(units), worth)
    made = {"make": fenced(actor), "arguments": actor_arguments}
    how: dict[str, Any] = {"fn": _Actor, "fn_constructor_kwargs": made}
    how["compute"] = ActorPoolStrategy(
        min_size=least, max_size=most, initial_size=start, max_tasks_in_flight_per_actor=2
    )
    if pool.tasks:
        how = {
            "fn": _as_actor,
            "fn_kwargs": {"key": uuid.uuid4().hex, **made},
            "compute": TaskPoolStrategy(most),
        }
    with DataContext.current(context):
        dataset = ray.data.read_datasource(
            _Units(units, fenced(read)),
            override_num_blocks=len(units),
            num_cpus=pool.read_cpus,
            concurrency=most if pool.tasks else None,
        )
        # map_batches refuses whole blocks with a GPU, and with a batch size would put units together
        dataset = dataset.map_batches_internal(
            batch_size=None, num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, **how
        )
        try:
            with requesting(
                resource_shape(pool.num_cpus, pool.num_gpus), resource_shape(pool.read_cpus)
            ):
                for batch in dataset.iter_batches(
                    batch_size=None, batch_format="numpy", prefetch_batches=0
                ):
                    for row in range(len(batch["unit"])):
                        on_result({key: _plain(column[row]) for key, column in batch.items()})
        except Exception as error:
            raise as_raypipe_error(error) from error


class _Actor:
    """An actor of another class, made where the fences of the driver stand."""

    def __init__(
        self, make: Callable[..., Callable[[Batch], Batch]], arguments: dict[str, Any]
    ) -> None:
        self._actor = make(**arguments)

    def __call__(self, batch: Batch) -> Batch:
        return self._actor(batch)


_kept: tuple[str, Callable[[Batch], Batch] | None] = ("", None)


def _as_actor(
    batch: Batch, key: str, make: Callable[..., Callable[[Batch], Batch]], arguments: dict[str, Any]
) -> Batch:
    """What an actor does, by one that is made once in each process that has tasks of a stream with this key."""
    global _kept
    if _kept[0] != key:
        _kept = ("", None)  # before there is another
        _kept = (key, make(**arguments))
    assert _kept[1] is not None
    return _kept[1](batch)


class _Units(Datasource):
    """A Ray Data source with one read task per unit."""

    def __init__(self, units: Sequence[Any], read: Callable[[Any], Batch]) -> None:
        self._units, self._read = units, read

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Reader(self._read, unit), metadata) for unit in self._units]


class _Reader:
    def __init__(self, read: Callable[[Any], Batch], unit: Any) -> None:
        self._read, self._unit = read, unit

    def __call__(self) -> Iterable[pa.Table]:
        return [BlockAccessor.batch_to_block(self._read(self._unit))]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
