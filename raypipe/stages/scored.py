"""Samples with a measured score, as the extrapolators see them: the seed set and the audit set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.names import SIGNALS
from raypipe.rundir import Run
from raypipe.stages.embed import count_rows, read_special_rows

COLUMNS = ["sample_id", "label", "embedding", *SIGNALS]
WHOLE_METHODS = {"gnn-published"}
"""Extrapolators whose graph is over the whole source."""
FOLDERS = {"seed": "measured", "audit": "measured/audit"}
GIVEN = "scored.parquet"
"""Under `extrapolator/`: scored samples that were given in tables (`raypipe.stages.own`), in place of a seed set."""


def nodes_of(table: pa.Table) -> Any:
    """Samples of a table of embeddings as the extrapolators see them; without a proxy there are no signals."""
    from raypipe.extrapolate.base import Nodes

    column = table["embedding"].combine_chunks()
    embedding = np.asarray(column.flatten(), np.float32).reshape(len(table), -1)
    label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    signals = [table[name].to_numpy() for name in SIGNALS if name in table.column_names]
    return Nodes(embedding, label, np.stack(signals, 1) if signals else np.zeros((len(table), 0)))


def measured_scores(run: Run, score: str, which: str) -> dict[str, float]:
    """A measured score of every sample of the `seed` or the `audit` set by id; empty where it was not measured there."""
    result: dict[str, float] = {}
    for _, table in storage.iter_tables(run.path(FOLDERS[which])):
        if score in table.column_names:
            result.update(zip(table["sample_id"].to_pylist(), table[score].to_pylist(), strict=True))
    return result


def count_measured(run: Run) -> int:
    """Measured samples of the seed set, or the scored ones of a folder that was made from tables."""
    if GIVEN in storage.names(run.path("extrapolator")):
        with storage.open_read(run.path("extrapolator", GIVEN)) as file:
            return pq.ParquetFile(file).metadata.num_rows
    return count_rows(run, FOLDERS["seed"])


def every_measured_score(run: Run, score: str) -> dict[str, float]:
    """A measured score by id, of seed set and audit set."""
    return measured_scores(run, score, "seed") | measured_scores(run, score, "audit")


@dataclass(frozen=True)
class Scored:
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


class Samples:
    """What an extrapolator is fitted and judged on; with `whole`, within everything in the source."""

    def __init__(self, config: Config, run: Run, samples: int, whole: bool) -> None:
        from raypipe.extrapolate.base import Nodes

        self._run, self._score, self.whole = run, config.score, whole
        self.everything: Any = None
        self.names: list[str] = sorted(run.done("embeddings"))
        if whole:
            _check_memory(run, self.names[0], samples)
            self.tables = [storage.read_table(run.path("embeddings", f"{name}.parquet"), COLUMNS) for name in self.names]
            self.everything = Nodes.concat([nodes_of(table) for table in self.tables])
            self._ids = [sample_id for table in self.tables for sample_id in table["sample_id"].to_pylist()]
        seed = self._scored("seed") or _given(run)
        if seed is None:
            raise StageError("no seed sample has an embedding; the source changed completely. Use a new run folder")
        self.seed = seed

    def audit(self) -> Scored | None:
        """The audit set; None where the score was not measured on any."""
        return self._scored("audit")

    def _scored(self, which: str) -> Scored | None:
        scores = measured_scores(self._run, self._score, which)
        if self.whole:
            rows = np.array([row for row, sample_id in enumerate(self._ids) if sample_id in scores], np.int64)
            ids = [self._ids[row] for row in rows]
            return Scored(ids, self.everything.take(rows), _of(ids, scores), rows) if ids else None
        with ThreadPoolExecutor(16) as threads:
            # in the order of fragment names
            parts = (
                list(threads.map(lambda fragment: read_special_rows(self._run, fragment, which), self.names)) if scores else []
            )
        tables = [part.select(COLUMNS).replace_schema_metadata(None) for part in parts if part is not None]
        if not tables:
            return None
        table = pa.concat_tables(tables)
        table = table.filter(pa.array([sample_id in scores for sample_id in table["sample_id"].to_pylist()], pa.bool_()))
        ids = table["sample_id"].to_pylist()
        return Scored(ids, nodes_of(table), _of(ids, scores)) if ids else None


def _given(run: Run) -> Scored | None:
    """The scored samples of a folder that was made from tables; None in a run."""
    if GIVEN not in storage.names(run.path("extrapolator")):
        return None
    table = storage.read_table(run.path("extrapolator", GIVEN))
    return Scored(table["sample_id"].to_pylist(), nodes_of(table), table["score"].to_numpy())


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
