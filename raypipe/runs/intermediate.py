"""Remove what a finished run no longer needs: files that only other scores are measured from.

The final checkpoint of every proxy stays, because new samples are embedded with it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Intermediate:
    """Files and folders that a finished run does not need.

    Attributes
    ----------
    kinds : tuple of str
        What is among them; recorded in the ledger once they are removed.
    sizes : dict of str to int
        URI and bytes of each; 0 for a folder that does not exist.
    rehearsal : bool
        Whether the proxy of a rehearsal is among them.
    """

    kinds: tuple[str, ...]
    sizes: dict[str, int]
    rehearsal: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.sizes.values())

    def __str__(self) -> str:
        *others, last = [*self.kinds, *["proxy of the rehearsal"] * self.rehearsal] or ["nothing"]
        return f"{', '.join(others)} and {last}" if others else last


def remove_intermediate(run: Run, config: Config) -> tuple[list[str], int]:
    """Remove what none of the measured scores needs; return what that was, and its bytes.

    Scores at checkpoints are measured again by a night, on new samples, and scores of a trajectory
    when their options change: what they are measured from stays.
    """
    found = find_intermediate(run, config)
    for uri, size in found.sizes.items():
        if size:
            storage.delete(uri)
    return list(found.kinds), found.bytes


def find_intermediate(run: Run, config: Config) -> Intermediate:
    """Return what none of the measured scores needs; see `remove_intermediate`."""
    kinds, sizes = [], dict[str, int]()
    parts = proxy_parts(run)
    if not config.measure.at_checkpoints:
        kinds.append(CHECKPOINTS)
        for part in parts:
            folder = run.path(part.checkpoints)
            sizes |= {
                storage.join(folder, file.path): file.size
                for file in storage.listing(folder)
                if file.path != part.trained.final
            }
    if not config.measure.from_trajectory:
        kinds.append(TRAJECTORY)
        for part in parts:
            sizes |= _folder(run.path(part.folder, TRAJECTORY))
    rehearsal = _folder(inner_run(run).proxy_folder)
    return Intermediate(tuple(kinds), sizes | rehearsal, any(rehearsal.values()))


def folder_sizes(run: Run) -> dict[str, int]:
    """Return the bytes in each folder of a run, largest first; "." has the files next to them."""
    sizes = Counter[str]()
    for file in storage.listing(run.uri):
        folder, inside, _ = file.path.partition("/")
        sizes[folder if inside else "."] += file.size
    return dict(sizes.most_common())


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


def _folder(uri: str) -> dict[str, int]:
    """Return a folder with the bytes in it."""
    return {uri: sum(file.size for file in storage.listing(uri))}
