"""The assessment of a fitted extrapolator, `extrapolator/fidelity.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from raypipe import storage
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from raypipe.assessment.conformal import Conformal
    from raypipe.assessment.intervals import Intervals

Json = Mapping[str, Any]
"""An object as JSON holds it; it is passed on as it is, to the ledger and to other files."""
NO_SEARCH: Json = MappingProxyType({"kind": "none", "recall": None, "note": ""})
"""`FidelityFile.search` where no neighbours are searched."""


@dataclass(frozen=True)
class FidelityFile:
    """Fidelity, calibrated intervals and the neighbour search of a fitted extrapolator.

    Attributes
    ----------
    measured : int
        Samples with a measured score: seed set and audit set.
    keep : tuple of float
        Keep fractions for which there are figures.
    fidelity : Json
        Figures (`raypipe.assessment.fidelity.Fidelity.as_dict`) on the samples that decide:
        `judged_on` names them as audit, rehearsal or seed.
    fidelity_seed : Json
        Figures on the held-out seed samples.
    intervals : Json
        State of the intervals (`raypipe.assessment.intervals.Intervals.state`; in a run of version
        0.2.0 or older that of `raypipe.assessment.conformal.Conformal`).
    search : Json
        Kind and recall of the neighbour search, and notes on it.
    stability : Json
        Figures (`raypipe.assessment.stability.Stability.as_dict`); empty in older runs.
    with_extremes : bool
        Whether the figures include audited extreme predictions.
    """

    measured: int
    keep: tuple[float, ...]
    fidelity: Json
    fidelity_seed: Json
    intervals: Json
    search: Json
    stability: Json = field(default_factory=dict)
    with_extremes: bool = False

    @classmethod
    def read(cls, run: Run) -> FidelityFile:
        """Read the file of a run. Raises FileNotFoundError when the run has none."""
        data = storage.read_json(run.fidelity_file)
        # older runs lack some fields
        values = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        return cls(**{**values, "keep": tuple(values["keep"])})

    def write(self, run: Run) -> None:
        """Write the file of a run."""
        storage.write_json(run.fidelity_file, {**vars(self), "keep": list(self.keep)})

    def calibrated(self) -> Intervals | Conformal:
        """Return the calibrated intervals."""
        from raypipe.assessment.conformal import Conformal
        from raypipe.assessment.intervals import Intervals

        if "scale" in self.intervals:
            return Intervals.from_state(self.intervals)
        return Conformal.from_state(self.intervals)


def search_of(model_file: str) -> Json:
    """Return how a fitted extrapolator searches neighbours. One from outside may not do so."""
    search = storage.read_json(model_file).get("search")
    fits = isinstance(search, dict) and search.keys() >= NO_SEARCH.keys()
    return search if fits else dict(NO_SEARCH)


def search_notes(search: Json, classes: Sequence[str]) -> list[str]:
    """Return the notes on the neighbour search, over all samples and within classes."""
    notes = [(search["note"], "")]
    notes += [
        (part["note"], f" (class {classes[int(label)]})")
        for label, part in search.get("classes", {}).items()
    ]
    return [note + where for note, where in notes if note]
