"""The score late-doubt: how little the proxy believes the label at the end of the training."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from raypipe.config.base import Settings
from raypipe.scores.base import Score
from raypipe.scores.trajectory import Trajectory, require_epochs


class LateDoubtOptions(Settings):
    """Options of late-doubt."""

    epochs: int = Field(3, ge=1, description="Number of epochs to use, from the last.")


class LateDoubt(Score):
    """Mean probability of all classes but the label, over the last epochs."""

    Options = LateDoubtOptions
    summary = "mean probability of all classes but the label in the last epochs"
    reads = ("loss",)
    high_is_hard = True

    def score(self, trajectory: Trajectory) -> np.ndarray:
        epochs = self.options.epochs
        require_epochs("late-doubt", trajectory.epochs, epochs, "epochs")
        return 1 - trajectory.label_probability[-epochs:].mean(0)
