"""What every stage is, and what it is given."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from raypipe.config import Config
from raypipe.progress import Progress
from raypipe.rundir import Run, StageRecord, interrupt_of_main_thread

if TYPE_CHECKING:
    from raypipe.stages.cluster import Cluster
    from raypipe.stages.demand import DemandWatch


class Context:
    """What a stage is given: the configuration, the run, where to show progress, and Ray, started when first used."""

    def __init__(self, config: Config, run: Run, progress: Progress, verbose: bool = False) -> None:
        self.config = config
        self.run = run
        self.progress = progress
        self.verbose = verbose
        self._demand: DemandWatch | None = None

    @cached_property
    def cluster(self) -> Cluster:
        from raypipe.stages.cluster import connect
        from raypipe.stages.demand import DemandWatch
        from raypipe.stages.metrics import RayMetrics

        found = connect(self.config.cluster, self.run, self.progress, self.verbose)
        patience, give_up = self.config.cluster.patience_seconds, interrupt_of_main_thread()
        self.progress.listeners.append(RayMetrics())
        self._demand = DemandWatch(self.progress.say, found.can_grow, patience, give_up)
        return found

    def look_again(self) -> None:
        """Take the cluster as it is now, where Ray was started before: nodes come and go between two stages."""
        if self._demand is not None:
            from raypipe.stages.cluster import survey

            self.cluster = survey(self.cluster.joined)

    def within(self, config: Config, run: Run) -> Context:
        """A context for a run within this one, on the same Ray."""
        found = Context(config, run, self.progress, self.verbose)
        found.cluster = self.cluster
        return found

    @property
    def starved(self) -> str:
        """What the run waited for in vain, in a sentence, where it was interrupted for that; else ""."""
        return self._demand.given_up if self._demand is not None else ""

    def close(self) -> None:
        """No more looks at the cluster, nor metrics for it."""
        self.progress.listeners.clear()
        if self._demand is not None:
            self._demand.stop()


class Stage(abc.ABC):
    """One stage. Its outputs are files named after fragments, so that what is there is done."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Stages whose settings its outputs depend on, where the run has them."""
    changed: ClassVar[str] = "settings changed"
    """Why its outputs are made anew, in the words of a line."""
    detail: Mapping[str, Any] = MappingProxyType({})
    """What the ledger says of it from its start."""

    def wanted(self, config: Config) -> bool:
        """Whether a run with this configuration has the stage at all."""
        return True

    @abc.abstractmethod
    def settings(self, config: Config) -> dict[str, Any]:
        """The settings its outputs depend on; how fast it goes (workers, batch sizes of inference) is none of them."""

    def clear(self, context: Context) -> None:
        """Remove outputs that other settings made."""
        context.run.clear(self.name)

    @abc.abstractmethod
    def complete(self, context: Context, record: StageRecord) -> bool:
        """Whether every output is there, told by listing and not by trust."""

    @abc.abstractmethod
    def execute(self, context: Context, record: StageRecord) -> None:
        """Make what is missing. Fills the record's samples, cpu_seconds, gpu_seconds and detail."""
