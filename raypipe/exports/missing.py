"""Report the samples of a keep-list that the source no longer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raypipe import storage
from raypipe.errors import StageError


class MissingSample(NamedTuple):
    """A sample of the keep-list that cannot be exported, and why."""

    sample_id: str
    reason: str


def report_missing(
    uri: str, missing: Sequence[MissingSample], samples: int, allow_missing: bool
) -> None:
    """Write all missing samples with their reasons to a JSON file, or delete it if there are none.

    Parameters
    ----------
    uri : str
        The file to write.
    missing : sequence of MissingSample
        The missing samples.
    samples : int
        Number of samples in the keep-list.
    allow_missing : bool
        Whether missing samples are no error.

    Raises
    ------
    StageError
        If samples are missing and `allow_missing` is False.
    """
    if not missing:
        storage.delete(uri)
        return
    storage.write_json(uri, [sample._asdict() for sample in missing])
    if not allow_missing:
        examples = "; ".join(f"{sample_id}: {reason}" for sample_id, reason in missing[:3])
        more = "; ..." if len(missing) > 3 else ""
        raise StageError(
            f"{len(missing):,} of the {samples:,} samples of the keep-list are missing "
            f"({examples}{more}); all are listed in {uri}. Fix the source and rerun, or continue "
            "without them (--allow-missing)"
        )
