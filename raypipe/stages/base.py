"""The interface of a stage."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.outside_code import OutsideCode, fingerprint_of
from raypipe.runs.ledger import StageRecord, fingerprint


class Stage(abc.ABC):
    """One stage of a run.

    Its outputs are files named after fragments or shards; a file that exists is done.

    Attributes
    ----------
    name : str
        Name of the stage in the ledger.
    needs : tuple of str
        Stages whose settings the outputs depend on, as far as the run has them.
    changed : str
        Why the outputs are computed again, for a line of the progress display.
    detail : Mapping
        Initial content of `StageRecord.detail`.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    changed: ClassVar[str] = "settings changed"
    detail: Mapping[str, Any] = MappingProxyType({})

    def applies_to(self, config: Config) -> bool:
        """Return whether a run with this configuration has the stage."""
        return True

    def check(self, context: Context) -> None:  # noqa: B027 - most stages check nothing
        """Raise ConfigError for settings that would make the stage fail, before any stage runs."""

    @abc.abstractmethod
    def settings(self, config: Config) -> dict[str, Any]:
        """Return the settings that the outputs depend on.

        Settings of speed (workers, batch sizes of inference) are not among them.
        """

    def fingerprint(
        self, config: Config, code: Sequence[OutsideCode], inputs: Sequence[str]
    ) -> str:
        """Return the fingerprint of everything that the outputs depend on.

        Parameters
        ----------
        config : Config
            The configuration.
        code : sequence of OutsideCode
            The code from outside raypipe that it names.
        inputs : sequence of str
            Fingerprints of the stages in `needs`, as far as the run has them.
        """
        own = fingerprint_of(self.name, code)
        return fingerprint(self.name, self.settings(config), inputs, *([own] if own else []))

    def clear(self, context: Context) -> None:
        """Remove the outputs of other settings."""
        context.run.clear(self.name)

    def reuses(self, context: Context) -> bool:
        """Return whether the outputs that `clear` left are reused, so that their cost counts."""
        return False

    @abc.abstractmethod
    def complete(self, context: Context, record: StageRecord) -> bool:
        """Return whether every output exists, by listing the files, not by the ledger."""

    @abc.abstractmethod
    def execute(self, context: Context, record: StageRecord) -> None:
        """Compute what is missing.

        Sets `samples` and `detail` of the record, and adds to `cpu_seconds` and `gpu_seconds`.
        """
