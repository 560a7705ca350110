"""Samples with a measured score, as the extrapolators see them: the seed set and the audit set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.runs.embeddings import COLUMNS, nodes_of, read_special_rows
from raypipe.runs.layout import Run
from raypipe.runs.measured_scores import GIVEN_SCORES, measured_scores

WHOLE_METHODS = {"gnn-published"}
"""Extrapolators whose graph is over the whole source."""


@dataclass(frozen=True)
class ScoredSamples:
    """Samples with their measured scores, float32 [n], and, in a graph over the whole source, their rows there."""

    ids: list[str]
    nodes: Any
    score: np.ndarray
    rows: np.ndarray | None = None

    @property
    def in_graph(self) -> np.ndarray:
        """`rows`, of samples that have them."""
        assert self.rows is not None
        return self.rows


class FitData:
    """What an extrapolator is fitted and judged on; with `whole`, within everything in the source."""

    def __init__(self, config: Config, run: Run, samples: int, whole: bool) -> None:
        from raypipe.extrapolators.base import Nodes

        self._run, self._score, self.whole = run, config.score, whole
        self.everything: Any = None
        self.names: list[str] = sorted(run.done("embeddings"))
        if whole:
            _check_memory(run, self.names[0], samples)
            self.tables = [
                storage.read_table(run.path("embeddings", f"{name}.parquet"), COLUMNS)
                for name in self.names
            ]
            self.everything = Nodes.concat([nodes_of(table) for table in self.tables])
            self._ids = [
                sample_id for table in self.tables for sample_id in table["sample_id"].to_pylist()
            ]
        seed = self._scored("seed") or _given(run)
        if seed is None:
            raise StageError(
                "no seed sample has an embedding; the source changed completely. Use a new run folder"
            )
        self.seed = seed

    def audit(self) -> ScoredSamples | None:
        """The audit set; None where the score was not measured on any."""
        return self._scored("audit")

    def _scored(self, which: str) -> ScoredSamples | None:
        scores = measured_scores(self._run, self._score, which)
        if self.whole:
            rows = np.array(
                [row for row, sample_id in enumerate(self._ids) if sample_id in scores], np.int64
            )
            ids = [self._ids[row] for row in rows]
            return (
                ScoredSamples(ids, self.everything.take(rows), _of(ids, scores), rows)
                if ids
                else None
            )
        with ThreadPoolExecutor(16) as threads:
            # in the order of fragment names
            parts = (
                list(
                    threads.map(
                        lambda fragment: read_special_rows(self._run, fragment, which), self.names
                    )
                )
                if scores
                else []
            )
        tables = [
            part.select(COLUMNS).replace_schema_metadata(None) for part in parts if part is not None
        ]
        if not tables:
            return None
        table = pa.concat_tables(tables)
        table = table.filter(
            pa.array(
                [sample_id in scores for sample_id in table["sample_id"].to_pylist()], pa.bool_()
            )
        )
        ids = table["sample_id"].to_pylist()
        return ScoredSamples(ids, nodes_of(table), _of(ids, scores)) if ids else None


def _given(run: Run) -> ScoredSamples | None:
    """The scored samples of a folder that was made from tables; None in a run."""
    if GIVEN_SCORES not in storage.names(run.path("extrapolator")):
        return None
    table = storage.read_table(run.path("extrapolator", GIVEN_SCORES))
    return ScoredSamples(table["sample_id"].to_pylist(), nodes_of(table), table["score"].to_numpy())


def _of(ids: list[str], scores: Mapping[str, float]) -> np.ndarray:
    return np.array([scores[sample_id] for sample_id in ids], np.float32)


def _check_memory(run: Run, fragment: str, samples: int) -> None:
    table = storage.read_table(run.path("embeddings", f"{fragment}.parquet"), ["embedding"])
    needed = 3 * 4 * samples * table.schema.field("embedding").type.list_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * memory:
        raise StageError(
            f"gnn-published holds the whole source in one process: about {needed / 2**30:.1f} GiB for "
            f"{samples:,} samples, but this machine has {memory / 2**30:.1f} GiB; extrapolate.method gnn has no such limit"
        )
