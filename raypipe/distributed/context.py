"""What a stage is given: configuration, run, progress, and Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from raypipe.config import Config
from raypipe.progress import Progress
from raypipe.runs.layout import Run
from raypipe.runs.lease import interrupt_of_main_thread

if TYPE_CHECKING:
    from raypipe.distributed.cluster import Cluster
    from raypipe.distributed.pending import PendingWatch


RunTasks = Callable[..., None]
"""The signature of `Context.run_tasks`: (units, function, on_result, *, num_cpus, in_flight)."""


class Context:
    """What a stage is given: the configuration, the run, where to show progress, and Ray, started when first used."""

    def __init__(self, config: Config, run: Run, progress: Progress, verbose: bool = False) -> None:
        self.config = config
        self.run = run
        self.progress = progress
        self.verbose = verbose
        self._demand: PendingWatch | None = None

    @cached_property
    def cluster(self) -> Cluster:
        from raypipe.distributed.cluster import connect
        from raypipe.distributed.metrics import RayMetrics
        from raypipe.distributed.pending import PendingWatch

        found = connect(self.config.cluster, self.run, self.progress, self.verbose)
        patience, give_up = self.config.cluster.patience_seconds, interrupt_of_main_thread()
        self.progress.listeners.append(RayMetrics())
        self._demand = PendingWatch(self.progress.say, found.can_grow, patience, give_up)
        return found

    def start_ray(self) -> None:
        """Join or start Ray, unless that has happened already."""
        _ = self.cluster

    def run_tasks(
        self,
        units: Iterable[Any],
        function: Callable[[Any], dict[str, Any]],
        on_result: Callable[[dict[str, Any]], None],
        *,
        num_cpus: float = 1,
        in_flight: int | None = None,
    ) -> None:
        """Run a function on every unit; see `raypipe.distributed.tasks.run_tasks`. Ray starts with the first unit."""
        remaining = iter(units)
        for first in remaining:
            self.start_ray()
            from raypipe.distributed.tasks import run_tasks

            run_tasks(
                chain([first], remaining),
                function,
                on_result,
                num_cpus=num_cpus,
                in_flight=in_flight,
            )

    def refresh_cluster(self) -> None:
        """Take the cluster as it is now, where Ray was started before: nodes come and go between two stages."""
        if self._demand is not None:
            from raypipe.distributed.cluster import current_cluster

            self.cluster = current_cluster(self.cluster.joined)

    def within(self, config: Config, run: Run) -> Context:
        """A context for a run within this one, on the same Ray."""
        found = Context(config, run, self.progress, self.verbose)
        found.cluster = self.cluster
        return found

    @property
    def gave_up_waiting(self) -> str:
        """What the run waited for in vain, in a sentence, where it was interrupted for that; else ""."""
        return self._demand.given_up if self._demand is not None else ""

    def close(self) -> None:
        """No more looks at the cluster, nor metrics for it."""
        self.progress.listeners.clear()
        if self._demand is not None:
            self._demand.stop()
