"""MoSo of one shard, from the alignments at all checkpoints."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.runs.layout import Run
from raypipe.runs.partition import SeedPart
from raypipe.stages.measure.gradients import (
    smallest_part,
)


class MosoTotals:
    """What MoSo needs of a whole part of the seed set: its size and, per checkpoint, the spread of the alignments.

    With several parts T, N and the spread are those of the part, so that scores are computed within it (Algorithm 1 of the paper).
    """

    @classmethod
    def of_parts(
        cls, config: Config, run: Run, parts: list[SeedPart], folder: str, shards: list[str]
    ) -> list[MosoTotals]:
        self_term = config.measure.moso.uses_self_term(smallest_part(parts))
        return [cls(config, run, part, part.below(folder), shards, self_term) for part in parts]

    def __init__(
        self,
        config: Config,
        run: Run,
        part: SeedPart,
        folder: str,
        shards: list[str],
        self_term: bool,
    ) -> None:
        self.settings, self.steps, self.self_term = (
            config.measure.moso,
            part.trained["steps"],
            self_term,
        )
        self.rates = np.array([item["lr"] for item in part.trained["checkpoints"]])
        self.samples, total, square = 0, np.zeros(len(self.rates)), np.zeros(len(self.rates))
        for shard in shards:
            aligned = numbers_in(read_numbers(run, folder, shard), "alignments")
            self.samples += len(aligned)
            total += aligned.sum(0)
            square += np.square(aligned).sum(0)
        mean = total / self.samples
        self.spread = np.sqrt(np.maximum(square / self.samples - mean**2, 0))
        # < G, g > averaged over the part is |G|^2
        self.mean_square = mean
        self.detail = {
            "self_term": self.self_term,
            "mean": mean.tolist(),
            "spread": self.spread.tolist(),
        }

    def score(self, table: pa.Table, audit: bool) -> np.ndarray:
        """MoSo, float32 [n], of a shard of the seed set, or of the audit set."""
        from raypipe.scores.moso import combine, joining, without_itself

        aligned = numbers_in(table, "alignments")
        if self.self_term:
            squares, count, mean_square = (
                numbers_in(table, "squares"),
                self.samples,
                self.mean_square,
            )
            if audit:
                aligned, mean_square = joining(aligned, squares, count, mean_square)
                count += 1
            aligned = without_itself(aligned, squares, count, self.settings.formula, mean_square)
        return combine(
            aligned,
            self.rates,
            self.settings.weights,
            steps=self.steps,
            samples=self.samples,
            spread=self.spread,
        )


def read_numbers(run: Run, folder: str, shard: str) -> pa.Table:
    return storage.read_table(run.path(folder, f"{shard}.parquet"))


def numbers_in(table: pa.Table, column: str) -> np.ndarray:
    """A column of lists as float64 [samples, checkpoints]."""
    if not len(table):
        return np.zeros((0, table.schema.field(column).type.list_size))
    return np.asarray(table[column].combine_chunks().flatten(), np.float64).reshape(len(table), -1)
