"""What the last files of an export describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raypipe.runs.run import Run


class FinishedShard(NamedTuple):
    """A shard that is complete.

    Attributes
    ----------
    name : str
        Its path in the export.
    samples, bytes : int
        Number of samples, and size of its file.
    detail : dict
        What its writer reported in addition.
    """

    name: str
    samples: int
    bytes: int
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class FinishedExport:
    """An export whose shards are all complete.

    Attributes
    ----------
    run : Run
        The run.
    keep_list : str
        URI of the keep-list.
    fingerprint : str
        Hash of the exported rows of the keep-list.
    to : str
        The folder.
    classes : sequence of str
        Names of the classes.
    weighted : bool
        Whether the samples have weights.
    snapshot : str or None
        The snapshot of a nightly run that the keep-list is of.
    shards : sequence of FinishedShard
        The shards in order; those without samples are left out.
    """

    run: Run
    keep_list: str
    fingerprint: str
    to: str
    classes: Sequence[str]
    weighted: bool
    snapshot: str | None
    shards: Sequence[FinishedShard]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(shard.samples for shard in self.shards)
