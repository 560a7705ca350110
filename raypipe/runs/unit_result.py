"""The result that a worker returns for one unit: a fragment, a seed shard, or a group of them."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """Counts and costs of one unit. The data itself is in a file that the worker wrote.

    Attributes
    ----------
    unit : str
        Name of the fragment or shard.
    samples : int
        Samples done, without rejects.
    rejects : int
        Samples that could not be used.
    reasons : str
        JSON as `raypipe.runs.rejects.summarize_rejects` returns it.
    cpu_seconds : float
        Processor time.
    gpu_seconds : float
        Wall time with a GPU, or a share of one.
    """

    unit: str = ""
    samples: int = 0
    rejects: int = 0
    reasons: str = "[]"
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def as_batch(self) -> dict[str, np.ndarray]:
        """Return the result as columns of length 1, the form in which Ray Data passes it on."""
        return {name: np.array([value]) for name, value in vars(self).items()}

    @classmethod
    def from_batch(cls, batch: dict[str, np.ndarray], row: int) -> UnitResult:
        """Restore one row of such columns."""
        # Ray gives strings as an array of objects, which have no `item`
        return cls(**{name: column.tolist()[row] for name, column in batch.items()})
