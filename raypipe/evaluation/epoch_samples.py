"""Trainings that take other samples in every epoch: redrawn lists and InfoBatch. No Ray.

They are compared with random lists at the same number of optimiser steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raypipe.keeplists.infobatch import InfoBatch
from raypipe.selection.redraw import draw, inclusion_probabilities, unbiased_weights
from raypipe.vision.fitting import EpochRows, State

REDRAWN, BY_SCORE, INFOBATCH = "redrawn", "redrawn-by-score", "infobatch"
"""Choices of `EvaluateSettings.dynamic`."""
SCORE_RATIO = 3.0
"""How much more likely `redrawn-by-score` draws the sample with the highest score than that with
the lowest."""
LOSS = "rows.loss"
"""Name of the losses of InfoBatch in the state of a training."""


@dataclass(frozen=True, eq=False)
class EpochSamples:
    """How the samples of each epoch are chosen from all that can be trained on.

    Attributes
    ----------
    kind
        `REDRAWN`, `BY_SCORE` or `INFOBATCH`.
    count
        Samples of a list of the fraction: those of an epoch, or with InfoBatch those that the
        number of steps follows from.
    hashes
        Hashes of the ids, uint64 [n].
    score
        float32 [n], for `BY_SCORE`; otherwise empty.
    """

    kind: str
    count: int
    hashes: np.ndarray
    score: np.ndarray

    def key(self) -> bytes:
        """Return what determines the choice, for the name of a training."""
        numbers = self.hashes.astype("<u8").tobytes() + self.score.astype("<f4").tobytes()
        return f"{self.kind} {self.count} {SCORE_RATIO} ".encode() + numbers

    def start(self, seed: int) -> EpochRows:
        """Return what chooses the rows of a training."""
        if self.kind == INFOBATCH:
            return _InfoBatchRows(self.hashes, seed)
        score = self.score if self.kind == BY_SCORE else np.zeros(len(self.hashes))
        return _RedrawnRows(
            self.hashes, inclusion_probabilities(score, self.count, SCORE_RATIO), seed
        )


class _RedrawnRows:
    """Another draw in every epoch."""

    def __init__(self, hashes: np.ndarray, probability: np.ndarray, seed: int) -> None:
        self._hashes, self._probability, self._seed = hashes, probability, seed
        self._weights = unbiased_weights(probability)

    def choose(self, epoch: int, progress: float) -> tuple[np.ndarray, np.ndarray]:
        rows = draw(self._hashes, self._probability, self._seed, epoch)
        return rows, self._weights[rows]

    def record(self, rows: np.ndarray, losses: np.ndarray) -> None:
        pass

    def state(self) -> State:
        return {}

    def restore(self, state: State) -> None:
        pass


class _InfoBatchRows:
    """The samples that InfoBatch leaves."""

    def __init__(self, hashes: np.ndarray, seed: int) -> None:
        self._infobatch = InfoBatch(len(hashes), seed=seed, ids=hashes)

    def choose(self, epoch: int, progress: float) -> tuple[np.ndarray, np.ndarray]:
        return self._infobatch.choose(epoch, progress)

    def record(self, rows: np.ndarray, losses: np.ndarray) -> None:
        self._infobatch.record(rows, losses)

    def state(self) -> State:
        return {LOSS: torch.from_numpy(self._infobatch.loss.copy())}

    def restore(self, state: State) -> None:
        self._infobatch.loss = state[LOSS].numpy().copy()
