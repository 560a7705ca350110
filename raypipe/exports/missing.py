"""Report the samples of a keep-list that the source no longer has."""

from __future__ import annotations

from collections.abc import Sequence

from raypipe import storage
from raypipe.errors import StageError


def report_missing(
    uri: str, missing: Sequence[tuple[str, str]], samples: int, allowed: bool
) -> None:
    """Write every sample that is missing and why to `uri`; remove it where none is. Raises StageError unless it is allowed."""
    if not missing:
        storage.delete(uri)
        return
    storage.write_json(
        uri, [{"sample_id": sample_id, "reason": reason} for sample_id, reason in missing]
    )
    if not allowed:
        shown = "; ".join(f"{sample_id}: {reason}" for sample_id, reason in missing[:3]) + (
            "; ..." if len(missing) > 3 else ""
        )
        raise StageError(
            f"{len(missing):,} of the {samples:,} samples of the keep-list are missing ({shown}); all are in {uri}. Mend the source and "
            "run it again, or go on without them with --allow-missing"
        )
