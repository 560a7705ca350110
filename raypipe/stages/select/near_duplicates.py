"""Near duplicates of a run, found in `embeddings/` cluster by cluster, and marked so that no keep-list has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.run import Run
from raypipe.runs.score_stream import ScoreStream, read_embedding_columns
from raypipe.selection import ALWAYS, NEVER, hash64
from raypipe.selection import near_duplicates as near
from raypipe.selection.hashing import uniform

HELD_BYTES = 1 << 30
"""Embeddings held at once; where the clusters have more, `embeddings/` is read several times over."""


def mark_near_duplicates(run: Run, scores: ScoreStream, threshold: float) -> dict[str, Any]:
    """Mark as NEVER all but the best of near duplicates: the highest score, equal ones by hash of the id. Returns counts.

    Samples marked ALWAYS stay, and others like them go; samples marked NEVER before do not count. Memory: 4 bytes a sample for its cluster,
    `CACHE_BYTES` of embeddings (or one cluster, where that is larger), and one shard. Raises RunError where a run has no embeddings.
    """
    rows, width, kind = _shape(run, scores.shards())
    samples = sum(rows.values())
    clusters = near.clusters_for(samples)
    cluster = dict.fromkeys(rows, np.zeros(0, np.int32))
    if clusters > 1:
        centroid = near.centroids(
            _drawn(run, list(rows), clusters * near.POINTS_PER_CLUSTER / samples), clusters
        )
        for shard, table in storage.ahead(
            lambda file: read_embedding_columns(run, file, ["embedding"]), list(rows), run.uri
        ):
            cluster[shard] = near.nearest_centroid(
                near.unit_vectors(_vectors(table)), centroid
            ).astype(np.int32)
    else:
        cluster = {shard: np.zeros(count, np.int32) for shard, count in rows.items()}
    members = sum(
        (np.bincount(part, minlength=clusters) for part in cluster.values()),
        np.zeros(clusters, np.int64),
    )
    found = 0
    for low, high in _batches(members * width * kind.itemsize):
        gathered = _gather(
            run, scores, cluster, low, high, np.empty((int(members[low:high].sum()), width), kind)
        )
        found += _mark(scores, list(rows), gathered, threshold)
    return {"near_duplicates": found, "clusters": clusters, "largest_cluster": int(members.max())}


def _shape(run: Run, shards: list[str]) -> tuple[dict[str, int], int, np.dtype[Any]]:
    """Rows of each shard, values of an embedding, and their type, from the footers."""

    def footer(shard: str) -> tuple[int, int, np.dtype[Any]]:
        try:
            with storage.open_read(storage.join(run.embeddings_folder, shard)) as file:
                parquet = pq.ParquetFile(file)
                kind = parquet.schema_arrow.field("embedding").type
                return (
                    parquet.metadata.num_rows,
                    kind.list_size,
                    np.dtype(kind.value_type.to_pandas_dtype()),
                )
        except (FileNotFoundError, KeyError, AttributeError):
            raise RunError(
                f"{run.uri}: select.near_duplicates needs embeddings/, and {shard} is not there; run it again"
            ) from None

    found = dict(storage.ahead(footer, shards, run.uri))
    if not found:
        raise RunError(
            f"{run.uri}: scores/ holds no sample, so there are no near duplicates to look for"
        )
    return {shard: count for shard, (count, _, _) in found.items()}, *next(iter(found.values()))[1:]


def _vectors(table: pa.Table) -> np.ndarray:
    """Embeddings as they are stored, [n, d]."""
    column = table["embedding"].combine_chunks()
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return (
        column.flatten().to_numpy().reshape(len(table), -1)
        if len(table)
        else np.zeros((0, column.type.list_size), np.float32)
    )


def _drawn(run: Run, shards: list[str], fraction: float) -> np.ndarray:
    """About that share of the embeddings, drawn by a hash of the id, as unit vectors."""
    parts = []
    for _, table in storage.ahead(
        lambda file: read_embedding_columns(run, file, ["sample_id", "embedding"]), shards, run.uri
    ):
        rows = uniform(hash64(table["sample_id"].combine_chunks(), near.SEED)) < fraction
        parts.append(near.unit_vectors(_vectors(table)[rows]))
    return np.concatenate(parts)


def _batches(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of clusters, one after the other, each of at most `CACHE_BYTES` or of one cluster."""
    low, held = 0, 0
    for high, size in enumerate(sizes.tolist()):
        if held and held + size > HELD_BYTES:
            yield low, high
            low, held = high, 0
        held += size
    yield low, len(sizes)


class Gathered(NamedTuple):
    """Samples of some clusters: embedding [n, d], cluster, score, hash of the id, mark, shard (its number) and row [n]."""

    embedding: np.ndarray
    cluster: np.ndarray
    score: np.ndarray
    hashes: np.ndarray
    mark: np.ndarray
    shard: np.ndarray
    row: np.ndarray


def _gather(
    run: Run,
    scores: ScoreStream,
    cluster: dict[str, np.ndarray],
    low: int,
    high: int,
    space: np.ndarray,
) -> Gathered:
    """The samples of clusters from `low` up to `high` that are not marked NEVER, from one pass over embeddings and scores."""
    parts: list[tuple[np.ndarray, ...]] = []
    count = 0
    tables = storage.ahead(
        lambda file: read_embedding_columns(run, file, ["sample_id", "embedding"]),
        list(cluster),
        run.uri,
    )
    for number, ((shard, table), (name, chunk)) in enumerate(
        zip(tables, scores.named_chunks(True), strict=True)
    ):
        ids = table["sample_id"].combine_chunks()
        if name != shard or len(table) != len(chunk.score) or not ids.equals(chunk.sample_id):
            raise RunError(
                f"{run.uri}: embeddings/ and scores/ of {shard} are not of the same samples; run it again"
            )
        rows = np.flatnonzero((cluster[shard] >= low) & (cluster[shard] < high) & chunk.eligible())
        space[count : count + len(rows)] = _vectors(table)[rows]
        count += len(rows)
        mark = np.zeros(len(rows), np.uint8) if chunk.mark is None else chunk.mark[rows]
        where = (np.full(len(rows), number, np.int32), rows.astype(np.int32))
        parts.append((cluster[shard][rows], chunk.score[rows], hash64(ids)[rows], mark, *where))
    return Gathered(space[:count], *(np.concatenate(column) for column in zip(*parts, strict=True)))


def _mark(scores: ScoreStream, shards: list[str], found: Gathered, threshold: float) -> int:
    """Mark the near duplicates of whole clusters; returns how many there are."""
    order = np.lexsort((found.hashes, -found.score, found.mark != ALWAYS, found.cluster))
    edges = np.flatnonzero(np.diff(found.cluster[order], prepend=-1))
    gone = np.zeros(len(order), bool)
    for start, stop in zip(edges.tolist(), [*edges[1:].tolist(), len(order)], strict=True):
        rows = order[start:stop]
        gone[rows] = near.redundant(
            near.unit_vectors(found.embedding[rows]), threshold, found.mark[rows] == ALWAYS
        )
    for number in np.unique(found.shard[gone]).tolist():
        scores.marks.add(shards[number], found.row[gone & (found.shard == number)], NEVER)
    return int(gone.sum())
