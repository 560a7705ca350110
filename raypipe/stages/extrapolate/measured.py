"""Samples with a measured score, as the extrapolators need them: the seed set and the audit set.

All samples are in the canonical order (`raypipe.selection.hashing.canonical_order`): what is drawn
or summed by row depends on the ids alone, and not on the fragments.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.runs.embeddings import COLUMNS, as_seen_by, nodes_of, read_special_rows, read_views
from raypipe.runs.measured_scores import GIVEN_SCORES, measured_scores
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.selection.hashing import canonical_order

if TYPE_CHECKING:
    from raypipe.distributed.actor_pool import Batch
    from raypipe.extrapolators.base import Nodes

SampleSet = Literal["seed", "audit"]
"""The set that samples with a measured score belong to."""
READERS = 16
"""Embedding files that are read at a time."""


@dataclass(frozen=True)
class ScoredSamples:
    """n samples with their measured scores.

    Attributes
    ----------
    ids : list of str
        Ids of the samples.
    nodes : Nodes
        Embeddings, labels and proxy statistics.
    score : np.ndarray
        Measured scores, float32 [n].
    rows : np.ndarray or None
        Their rows in a graph over the whole source, int64 [n]; None without such a graph.
    """

    ids: list[str]
    nodes: Nodes
    score: np.ndarray
    rows: np.ndarray | None = None

    @property
    def in_graph(self) -> np.ndarray:
        """`rows` of samples in a graph."""
        assert self.rows is not None
        return self.rows


@dataclass(frozen=True)
class WholeSource:
    """Everything in the source, held in memory for a graph over it.

    Attributes
    ----------
    tables : list of pa.Table
        Embeddings of each fragment, in the order of fragment names.
    nodes : Nodes
        All samples in the canonical order.
    ids : list of str
        Their ids.
    places : list of np.ndarray
        The place in this order of each row of each table, int64.
    """

    tables: list[pa.Table]
    nodes: Nodes
    ids: list[str]
    places: list[np.ndarray]

    @classmethod
    def read(cls, run: Run, fragments: list[str], roles: ProxyRoles) -> WholeSource:
        """Read the embeddings of all fragments, as extrapolators to part 0 see them."""
        from raypipe.extrapolators.base import Nodes

        def read(name: str) -> pa.Table:
            table = storage.read_table(run.embedding_shard(name), COLUMNS)
            return _seen(table, read_views(run, name, roles.in_views(roles.space(0))), roles, 0)

        tables = [read(name) for name in fragments]
        nodes = Nodes.concat([nodes_of(table) for table in tables])
        ids = [name for table in tables for name in table["sample_id"].to_pylist()]
        order = canonical_order(ids)
        stops = np.cumsum([len(table) for table in tables])[:-1]
        places = np.split(np.argsort(order), stops)
        return cls(tables, nodes.take(order), [ids[row] for row in order.tolist()], places)


def read_samples(config: Config, run_uri: str, fragment: str) -> Batch:
    """Read all samples of a fragment; no rows when all were rejected. Runs in a task.

    With cross-fitting, `part` names the part of each sample. Embeddings are those by the proxies of
    `ProxyRoles.space`, side by side.
    """
    run, roles = Run(run_uri), ProxyRoles.of(config)
    table = storage.read_table(run.embedding_shard(fragment), COLUMNS)
    ids = table["sample_id"].to_pylist()
    part, nodes = roles.part_of(ids), nodes_of(table)
    spaces = [roles.space(number) for number in range(roles.groups)]
    views = read_views(run, fragment, roles.in_views(itertools.chain.from_iterable(spaces)))
    embedding = np.zeros((len(ids), 0), np.float32)
    for number, space in enumerate(spaces):
        if space in spaces[:number]:
            continue
        rows = np.flatnonzero(np.array([other == space for other in spaces])[part])
        seen = _seen(table.take(pa.array(rows, pa.int64())), views, roles, number)
        values = nodes_of(seen).embedding
        if not number:
            embedding = np.empty((len(ids), values.shape[1]), np.float32)
        embedding[rows] = values
    return {
        "sample_id": np.array(ids),
        "label": nodes.label.astype(np.int32),
        "embedding": embedding,
        "signals": nodes.signals,
        "part": part,
    }


def _seen(table: pa.Table, views: Mapping[int, pa.Table], roles: ProxyRoles, part: int) -> pa.Table:
    """Return samples with their embeddings as extrapolators to the samples of a part see them."""
    return as_seen_by(table, views, roles.space(part), roles.features == "added")


class FitData:
    """What an extrapolator is fitted and assessed on.

    Attributes
    ----------
    names : list of str
        Names of the fragments with embeddings.
    seed : ScoredSamples
        The seed set, or the scored samples of a folder that was created from tables.
    source : WholeSource or None
        The whole source; None unless `whole`.

    Raises
    ------
    StageError
        When no seed sample has an embedding, or the whole source does not fit into memory.
    """

    def __init__(self, config: Config, run: Run, samples: int, whole: bool) -> None:
        self._run, self._score = run, config.score
        self._roles = ProxyRoles.of(config)
        self.names: list[str] = sorted(run.done("embeddings"))
        self.source: WholeSource | None = None
        if whole:
            _check_memory(run, self.names[0], samples, max(1, len(self._roles.space(0))))
            self.source = WholeSource.read(run, self.names, self._roles)
        seed = self._scored("seed") or _from_tables(run)
        if seed is None:
            raise StageError(
                "no seed sample has an embedding; the source changed completely. "
                "Use a new run folder"
            )
        self.seed = seed

    @property
    def everything(self) -> Nodes | None:
        """All samples of the source; None unless the whole source is held."""
        return self.source.nodes if self.source is not None else None

    def audit(self) -> ScoredSamples | None:
        """Return the audit set; None where the score was not measured on it."""
        return self._scored("audit")

    def _scored(self, which: SampleSet) -> ScoredSamples | None:
        scores = measured_scores(self._run, self._score, which)
        if not scores:
            return None
        if self.source is not None:
            return _take_scored(self.source, scores)
        return self._read_scored(which, scores)

    def _read_scored(self, which: SampleSet, scores: Mapping[str, float]) -> ScoredSamples | None:
        """Read the samples of one set from the embeddings, without reading the others."""
        table = _read_sets(self._run, self.names, [which], self._roles, 0)[which]
        if table is None:
            return None
        scored = [sample_id in scores for sample_id in table["sample_id"].to_pylist()]
        return _select(table, np.array(scored, bool), scores)


class PartData:
    """What the extrapolator to the samples of one part is fitted and assessed on.

    Attributes
    ----------
    seed : ScoredSamples
        Seed samples of the parts that `ProxyRoles.fit_parts` names, as the first viewer of the part
        embeds them in each repeat.
    held_out : dict of str to ScoredSamples
        Seed and audit samples of the part itself, by set, where there are any: nothing that the
        extrapolator depends on was fitted to them.

    Raises
    ------
    StageError
        When there is nothing to fit on.
    """

    def __init__(self, config: Config, run: Run, part: int) -> None:
        roles = ProxyRoles.of(config)
        self.held_out: dict[SampleSet, ScoredSamples] = {}
        seed = None
        sets: tuple[SampleSet, ...] = ("seed", "audit")
        measured = {which: measured_scores(run, config.score, which) for which in sets}
        names = sorted(run.done("embeddings"))
        present: list[SampleSet] = [which for which in sets if measured[which]]
        tables = _read_sets(run, names, present, roles, part)
        for which, table in tables.items():
            if table is None:
                continue
            scores = measured[which]
            ids = table["sample_id"].to_pylist()
            parts = roles.part_of(ids)
            scored = np.array([sample_id in scores for sample_id in ids], bool)
            if which == "seed":
                in_fit = scored & np.isin(parts, roles.fit_parts(part))
                seed = _select(table, in_fit, scores)
            held_out = _select(table, scored & (parts == part), scores)
            if held_out is not None:
                self.held_out[which] = held_out
        if seed is None:
            raise StageError(
                f"no seed sample to extrapolate to part {part} from has an embedding; raise "
                "seed.fraction, or use a new run folder if the source changed completely"
            )
        self.seed = seed


def _read_sets(
    run: Run, names: Sequence[str], sets: Sequence[SampleSet], roles: ProxyRoles, part: int
) -> dict[SampleSet, pa.Table | None]:
    """Read the samples of some sets from the embeddings, without reading the others.

    Parameters
    ----------
    run
        The run.
    names
        Names of the fragments.
    sets
        The sets.
    roles, part
        The embeddings are those that extrapolators to the samples of the part see; samples that
        their proxies do not embed are left out.

    Returns
    -------
    dict of str to pa.Table or None
        By set the columns `COLUMNS` in the canonical order; None without any sample.
    """

    def read(name: str) -> list[pa.Table | None]:
        tables = [read_special_rows(run, name, which) for which in sets]
        if all(table is None for table in tables):
            return tables
        views = read_views(run, name, roles.in_views(roles.space(part)))
        return [
            None
            if table is None
            else _seen(table.select(COLUMNS).replace_schema_metadata(None), views, roles, part)
            for table in tables
        ]

    with ThreadPoolExecutor(READERS) as threads:
        of_fragments = list(threads.map(read, names))
    result: dict[SampleSet, pa.Table | None] = {}
    for number, which in enumerate(sets):
        present = [table for tables in of_fragments if (table := tables[number]) is not None]
        result[which] = in_canonical_order(pa.concat_tables(present)) if present else None
    return result


def _select(table: pa.Table, rows: np.ndarray, scores: Mapping[str, float]) -> ScoredSamples | None:
    """Return the samples at `rows`, a mask, with their scores; None without any."""
    table = table.filter(pa.array(rows, pa.bool_()))
    ids = table["sample_id"].to_pylist()
    return ScoredSamples(ids, nodes_of(table), _scores_of(ids, scores)) if ids else None


def _take_scored(source: WholeSource, scores: Mapping[str, float]) -> ScoredSamples | None:
    """Return the samples of the source that have a score."""
    rows = np.array([row for row, name in enumerate(source.ids) if name in scores], np.int64)
    ids = [source.ids[row] for row in rows]
    if not ids:
        return None
    return ScoredSamples(ids, source.nodes.take(rows), _scores_of(ids, scores), rows)


def _from_tables(run: Run) -> ScoredSamples | None:
    """Return the scored samples of a folder that was created from tables; None in a run."""
    if GIVEN_SCORES not in storage.names(run.extrapolator_folder):
        return None
    table = in_canonical_order(storage.read_table(run.given_scores))
    return ScoredSamples(table["sample_id"].to_pylist(), nodes_of(table), table["score"].to_numpy())


def in_canonical_order(table: pa.Table) -> pa.Table:
    """Return a table of samples with its rows in the canonical order of their ids."""
    return table.take(pa.array(canonical_order(table["sample_id"].to_pylist()), pa.int64()))


def _scores_of(ids: list[str], scores: Mapping[str, float]) -> np.ndarray:
    return np.array([scores[sample_id] for sample_id in ids], np.float32)


def _check_memory(run: Run, fragment: str, samples: int, proxies: int) -> None:
    """Raise StageError when the embeddings of all samples need most of the memory."""
    table = storage.read_table(run.embedding_shard(fragment), ["embedding"])
    needed = 3 * 4 * proxies * samples * table.schema.field("embedding").type.list_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * memory:
        raise StageError(
            "gnn-published holds the whole source in one process: about "
            f"{needed / 2**30:.1f} GiB for {samples:,} samples, but this machine has "
            f"{memory / 2**30:.1f} GiB; extrapolate.method gnn has no such limit"
        )
