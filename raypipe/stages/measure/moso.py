"""MoSo of one shard, from the alignments at all checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.runs.partition import SeedPart
from raypipe.runs.run import Run
from raypipe.stages.measure.gradient_job import needs_self_term


class MosoTotals:
    """What MoSo needs to know of all alignments with the mean gradients of one proxy.

    With several parts, the number of steps and the number of samples are those of the part whose
    proxy it is (Algorithm 1 of the paper). With cross-fitting, the alignments are those of samples
    of the other parts.

    Attributes
    ----------
    samples : int
        Samples of the part.
    spread : np.ndarray
        Standard deviation of the alignments, float64 [checkpoints].
    mean_square : np.ndarray
        Mean of the alignments < G, g >, float64 [checkpoints]. Over the samples of the part itself
        it is |G|^2, G the mean gradient.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        part: SeedPart,
        folder: str,
        shards: Sequence[str],
        self_term: bool,
    ) -> None:
        self._settings, self._steps = config.measure.moso, part.trained.steps
        self._self_term = self_term
        self._rates = np.array([item.lr for item in part.trained.checkpoints])
        self.samples, measured = part.samples, 0
        total, square = np.zeros(len(self._rates)), np.zeros(len(self._rates))
        for shard in shards:
            aligned = checkpoint_column(read_shard_table(run, folder, shard), "alignments")
            measured += len(aligned)
            total += aligned.sum(0)
            square += np.square(aligned).sum(0)
        self.mean_square = total / measured
        variance = square / measured - self.mean_square**2
        self.spread = np.sqrt(np.maximum(variance, 0))

    @classmethod
    def of_parts(
        cls,
        config: Config,
        run: Run,
        parts: Sequence[SeedPart],
        folder: str,
        shards: Sequence[str],
    ) -> list[MosoTotals]:
        """Compute the totals of every proxy from the files below `folder`."""
        self_term = needs_self_term(config, parts)
        return [cls(config, run, part, part.below(folder), shards, self_term) for part in parts]

    def ledger_detail(self) -> dict[str, bool | list[float]]:
        """Return what the ledger records of the totals."""
        return {
            "self_term": self._self_term,
            "mean": self.mean_square.tolist(),
            "spread": self.spread.tolist(),
        }

    def score(self, table: pa.Table, audit: bool) -> np.ndarray:
        """Return MoSo, float32 [n], of a shard of the seed set, or of the audit set."""
        from raypipe.scores.moso import add_one_in, combine, leave_one_out

        aligned = checkpoint_column(table, "alignments")
        if self._self_term:
            squares = checkpoint_column(table, "squares")
            count, mean_square = self.samples, self.mean_square
            if audit:
                aligned, mean_square = add_one_in(aligned, squares, count, mean_square)
                count += 1
            aligned = leave_one_out(aligned, squares, count, self._settings.formula, mean_square)
        return combine(
            aligned,
            self._rates,
            self._settings.weights,
            steps=self._steps,
            samples=self.samples,
            spread=self.spread,
        )


def read_shard_table(run: Run, folder: str, shard: str) -> pa.Table:
    """Read the file of a shard in a folder of the run."""
    return storage.read_table(run.path(folder, f"{shard}.parquet"))


def checkpoint_column(table: pa.Table, column: str) -> np.ndarray:
    """Return a column of lists as float64 [samples, checkpoints]."""
    return storage.matrix_of(table[column]).astype(np.float64)
