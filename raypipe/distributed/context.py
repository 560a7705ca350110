"""Context of a stage: configuration, run, progress and Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from raypipe.config import Config
from raypipe.config.choices import library_of
from raypipe.errors import ResourceError
from raypipe.progress import Progress
from raypipe.runs.lease import interrupt_of_main_thread
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from raypipe.distributed.cluster import Cluster
    from raypipe.distributed.outside_code import OutsideCode
    from raypipe.distributed.pending import PendingWatch


Unit = TypeVar("Unit")
Result = TypeVar("Result")

RunTasks = Callable[..., None]
"""The signature of `Context.run_tasks`: (units, function, on_result, *, num_cpus, in_flight)."""


class Context:
    """Context of a stage. Ray starts when it is first used.

    Parameters
    ----------
    config : Config
        The configuration.
    run : Run
        The run folder.
    progress : Progress
        Where to print progress.
    verbose : bool
        Whether Ray logs to the console.
    """

    def __init__(self, config: Config, run: Run, progress: Progress, verbose: bool = False) -> None:
        self.config = config
        self.run = run
        self.progress = progress
        self.verbose = verbose
        self._pending_watch: PendingWatch | None = None

    @cached_property
    def code(self) -> tuple[OutsideCode, ...]:
        """The code from outside raypipe that the configuration names, imported on first access."""
        from raypipe.distributed.outside_code import import_code

        return import_code(self.config)

    @cached_property
    def cluster(self) -> Cluster:
        """The cluster, which is joined or started on first access."""
        from raypipe.distributed.cluster import connect
        from raypipe.distributed.metrics import RayMetrics
        from raypipe.distributed.pending import PendingWatch

        models = (self.config.proxy.model, self.config.embed.model)
        libraries = sorted({library for model in models if (library := library_of(model))})
        cluster = connect(self.config.cluster, self.run, self.progress, self.verbose, libraries)
        patience, give_up = self.config.cluster.patience_seconds, interrupt_of_main_thread()
        self.progress.listeners.append(RayMetrics())
        self._pending_watch = PendingWatch(self.progress.say, cluster.can_grow, patience, give_up)
        return cluster

    def check_cluster(self, stages: Collection[str]) -> None:
        """Check the cluster before any work, as far as that is quick, for stages that will run.

        Ray starts only if the settings request more than every cluster has.

        Raises
        ------
        RaypipeError
            If the cluster cannot be reached.
        ResourceError
            If it lacks GPUs or CPUs that the settings request.
        """
        from raypipe.distributed.cluster import set_ray_defaults
        from raypipe.distributed.reach import check_reachable

        ray = sys.modules.get("ray")
        if stages and (ray is None or not ray.is_initialized()):
            set_ray_defaults(self.verbose)
            check_reachable(self.config.cluster.address, self.progress)
        proxy, embed = self.config.proxy, self.config.embed
        if "proxy" in stages and (
            proxy.use_gpu is True or proxy.workers > 1 or proxy.cpus_per_worker != "auto"
        ):
            with _of_stage("proxy"):
                cluster = self.cluster.for_trainings(self.config.cluster)
                cluster.training_resources(proxy)
        for name, pool in (("measure", self.config.measure), ("embed", embed)):
            if name in stages and (pool.use_gpu is True or pool.min_actors > 1):
                with _of_stage(name):
                    self.cluster.pool(pool)
        if "extrapolate" in stages and self.config.extrapolate.use_gpu:
            with _of_stage("extrapolate"):
                self.cluster.use_gpu(True)

    def start_ray(self) -> None:
        """Join or start Ray, unless it is running already."""
        _ = self.cluster

    def run_tasks(
        self,
        units: Iterable[Unit],
        function: Callable[[Unit], Result],
        on_result: Callable[[Result], None],
        *,
        num_cpus: float = 1,
        in_flight: int | None = None,
    ) -> None:
        """Run a function on every unit, as `raypipe.distributed.tasks.run_tasks` does.

        Ray starts with the first unit, and not at all without one.
        """
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
        """Read the resources of a running cluster again, because nodes can join and leave."""
        if self._pending_watch is not None:
            from raypipe.distributed.cluster import current_cluster

            self.cluster = current_cluster(self.cluster.joined)

    def within(self, config: Config, run: Run) -> Context:
        """Return a context for a run inside this one, with the same cluster."""
        context = Context(config, run, self.progress, self.verbose)
        context.cluster = self.cluster
        return context

    @property
    def gave_up_waiting(self) -> str:
        """Message about the request that the run gave up waiting for, or ""."""
        return self._pending_watch.given_up if self._pending_watch is not None else ""

    def close(self) -> None:
        """Stop watching the cluster and sending metrics to it."""
        self.progress.listeners.clear()
        if self._pending_watch is not None:
            self._pending_watch.stop()


@contextmanager
def _of_stage(name: str) -> Iterator[None]:
    """Name the stage in errors about resources."""
    try:
        yield
    except ResourceError as error:
        raise ResourceError(f"{name}: {error}") from None
