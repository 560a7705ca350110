"""The strategy uncontradicted: the highest scores, without labels that the proxy contradicts."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from raypipe.config.base import Settings
from raypipe.selection import Chunk, KeepStrategy, SelectionOptions

LAST = np.finfo(np.float32).min
"""The preference of samples that are kept only where no others are left."""


class UncontradictedOptions(Settings):
    """Options of uncontradicted."""

    max_loss: float = Field(3.0, gt=0, description="Samples with a higher loss are kept last.")


class Uncontradicted(KeepStrategy):
    """Highest scores first, but samples whose label the proxy contradicts last."""

    Options = UncontradictedOptions
    summary = "highest scores without contradicted labels"
    kept = "the highest scores of the samples whose label the proxy does not contradict"
    needs_loss = True

    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        return np.where(chunk.loss <= self.options.max_loss, chunk.score, LAST)
