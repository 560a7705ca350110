"""Remove what a finished run no longer needs: files that only other scores are measured from.

The final checkpoint of every proxy stays, because new samples are embedded with it.
"""

from __future__ import annotations

from raypipe import storage
from raypipe.config import Config
from raypipe.runs.ledger import StageRecord
from raypipe.runs.partition import proxy_parts
from raypipe.runs.rehearsal import inner_run
from raypipe.runs.run import Run

CHECKPOINTS, TRAJECTORY = "checkpoints", "trajectory"
"""What can be removed."""
REMOVED = "removed"
"""Key in the details of the stage `proxy` under which the ledger names what was removed."""


def remove_intermediate(run: Run, config: Config) -> tuple[list[str], int]:
    """Remove what none of the measured scores needs; return what that was, and its bytes.

    Scores at checkpoints are measured again by a night, on new samples, and scores of a trajectory
    when their options change: what they are measured from stays.
    """
    removed, size = [], 0
    parts = proxy_parts(run)
    if not config.measure.at_checkpoints:
        removed.append(CHECKPOINTS)
        for part in parts:
            folder = run.path(part.checkpoints)
            for file in storage.listing(folder):
                if file.path != part.trained.final:
                    size += file.size
                    storage.delete(storage.join(folder, file.path))
    if not config.measure.from_trajectory:
        removed.append(TRAJECTORY)
        for part in parts:
            size += _delete(run.path(part.folder, TRAJECTORY))
    size += _delete(inner_run(run).path("proxy"))
    return removed, size


def lacks(record: StageRecord | None, config: Config) -> bool:
    """Return whether measuring the scores needs files that were removed.

    Parameters
    ----------
    record : StageRecord or None
        That of the stage `proxy`.
    config : Config
        The configuration.
    """
    removed = record.detail.get(REMOVED, []) if record is not None else []
    return bool(
        (CHECKPOINTS in removed and config.measure.at_checkpoints)
        or (TRAJECTORY in removed and config.measure.from_trajectory)
    )


def _delete(folder: str) -> int:
    size = sum(file.size for file in storage.listing(folder))
    if size:
        storage.delete(folder)
    return size
