"""What every stage is, and what it is given."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.runs.ledger import StageRecord

if TYPE_CHECKING:
    pass


class Stage(abc.ABC):
    """One stage. Its outputs are files named after fragments, so that what is there is done."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Stages whose settings its outputs depend on, where the run has them."""
    changed: ClassVar[str] = "settings changed"
    """Why its outputs are made anew, in the words of a line."""
    detail: Mapping[str, Any] = MappingProxyType({})
    """What the ledger says of it from its start."""

    def applies_to(self, config: Config) -> bool:
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
