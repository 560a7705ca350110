"""Find the near duplicates of a run in `embeddings/`, cluster by cluster, and exclude them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.run import Run
from raypipe.runs.score_stream import ScoreStream, read_embedding_columns
from raypipe.selection import ALWAYS, NEVER, hash64
from raypipe.selection import near_duplicates as near
from raypipe.selection.hashing import canonical_order, uniform

HELD_BYTES = 1 << 30
"""Embeddings held at a time. When the clusters have more, `embeddings/` is read several times."""


def mark_near_duplicates(run: Run, scores: ScoreStream, threshold: float) -> dict[str, int]:
    """Mark all but the best of near duplicates as NEVER.

    The best has the highest score, and of equal scores the lowest hash of the id. Samples marked
    ALWAYS stay, and others like them are excluded; samples already marked NEVER do not count.

    Parameters
    ----------
    run
        The run.
    scores
        Its scores, which get the marks.
    threshold
        Cosine similarity from which two samples are near duplicates.

    Returns
    -------
    dict of str to int
        Counts for the ledger: near_duplicates, clusters, largest_cluster.

    Raises
    ------
    RunError
        When the run has no embeddings.

    Notes
    -----
    Memory: 4 bytes a sample for its cluster, `HELD_BYTES` of embeddings (or one cluster, if that is
    larger), and one shard.
    """
    layout = EmbeddingLayout.read(run, scores.shards())
    samples = sum(layout.rows.values())
    count = near.clusters_for(samples)
    clusters = _assign_clusters(run, layout.rows, count)
    sizes = sum(
        (np.bincount(shard, minlength=count) for shard in clusters.values()),
        np.zeros(count, np.int64),
    )
    excluded = 0
    for low, high in _batches(sizes * layout.width * layout.dtype.itemsize):
        space = np.empty((int(sizes[low:high].sum()), layout.width), layout.dtype)
        batch = _gather(scores, clusters, low, high, space)
        excluded += _mark(scores, list(layout.rows), batch, threshold)
    return {
        "near_duplicates": excluded,
        "clusters": count,
        "largest_cluster": int(sizes.max()),
    }


@dataclass(frozen=True)
class EmbeddingLayout:
    """The shape of the embeddings of a run.

    Attributes
    ----------
    rows : dict of str to int
        Samples of each shard, by file name.
    width : int
        Values of an embedding.
    dtype : np.dtype
        Their type.
    """

    rows: dict[str, int]
    width: int
    dtype: np.dtype

    @classmethod
    def read(cls, run: Run, shards: list[str]) -> EmbeddingLayout:
        """Read it from the footers of the files. Raises RunError when one is missing."""

        def read_footer(shard: str) -> EmbeddingLayout:
            try:
                with storage.open_read(storage.join(run.embeddings_folder, shard)) as file:
                    parquet = pq.ParquetFile(file)
                    kind = parquet.schema_arrow.field("embedding").type
                    dtype = np.dtype(kind.value_type.to_pandas_dtype())
                    return cls({shard: parquet.metadata.num_rows}, kind.list_size, dtype)
            except (FileNotFoundError, KeyError, AttributeError):
                raise RunError(
                    f"{run.uri}: select.near_duplicates needs embeddings/, but {shard} is missing; "
                    "rerun `raypipe run`"
                ) from None

        layouts = [layout for _, layout in storage.ahead(read_footer, shards, run.uri)]
        if not layouts:
            raise RunError(
                f"{run.uri}: scores/ holds no sample, so there are no near duplicates to search for"
            )
        rows = {shard: count for layout in layouts for shard, count in layout.rows.items()}
        return cls(rows, layouts[0].width, layouts[0].dtype)


def _assign_clusters(run: Run, rows: dict[str, int], count: int) -> dict[str, np.ndarray]:
    """Return the cluster of every sample by shard, int32 [n]."""
    if count == 1:
        return {shard: np.zeros(samples, np.int32) for shard, samples in rows.items()}
    fraction = count * near.POINTS_PER_CLUSTER / sum(rows.values())
    centroids = near.centroids(_sample_embeddings(run, list(rows), fraction), count)
    clusters = {}
    for shard, table in storage.ahead(
        lambda file: read_embedding_columns(run, file, ["embedding"]), list(rows), run.uri
    ):
        vectors = near.unit_vectors(storage.matrix_of(table["embedding"]))
        clusters[shard] = near.nearest_centroid(vectors, centroids).astype(np.int32)
    return clusters


def _sample_embeddings(run: Run, shards: list[str], fraction: float) -> np.ndarray:
    """Return about this fraction of the embeddings, drawn by a hash of the id, as unit vectors.

    They are in the canonical order, which k-means depends on.
    """
    parts, ids = [], []
    for _, table in storage.ahead(
        lambda file: read_embedding_columns(run, file, ["sample_id", "embedding"]), shards, run.uri
    ):
        names = table["sample_id"].combine_chunks()
        rows = uniform(hash64(names, near.SEED)) < fraction
        parts.append(near.unit_vectors(storage.matrix_of(table["embedding"])[rows]))
        ids += names.filter(pa.array(rows)).to_pylist()
    return np.concatenate(parts)[canonical_order(ids)]


def _batches(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of clusters, each of at most `HELD_BYTES` or of one cluster."""
    low, held = 0, 0
    for high, size in enumerate(sizes.tolist()):
        if held and held + size > HELD_BYTES:
            yield low, high
            low, held = high, 0
        held += size
    yield low, len(sizes)


class ClusterBatch(NamedTuple):
    """The n samples of some clusters.

    Attributes
    ----------
    embedding : np.ndarray
        [n, d].
    cluster, score, hashes, mark : np.ndarray
        Cluster, score, hash of the id and mark of each sample, [n].
    shard, row : np.ndarray
        Number of its shard, and its row there, int32 [n].
    """

    embedding: np.ndarray
    cluster: np.ndarray
    score: np.ndarray
    hashes: np.ndarray
    mark: np.ndarray
    shard: np.ndarray
    row: np.ndarray


def _gather(
    scores: ScoreStream,
    clusters: dict[str, np.ndarray],
    low: int,
    high: int,
    space: np.ndarray,
) -> ClusterBatch:
    """Read the samples of clusters `low` to `high` (exclusive) that are not marked NEVER.

    One pass over embeddings and scores; the embeddings are written into `space`.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    count = 0
    for number, (shard, (chunk, vectors)) in enumerate(
        zip(clusters, scores.embedded(), strict=True)
    ):
        cluster = clusters[shard]
        rows = np.flatnonzero((cluster >= low) & (cluster < high) & chunk.eligible())
        space[count : count + len(rows)] = vectors[rows]
        count += len(rows)
        parts.append(
            (
                cluster[rows],
                chunk.score[rows],
                hash64(chunk.sample_id)[rows],
                np.zeros(len(rows), np.uint8) if chunk.mark is None else chunk.mark[rows],
                np.full(len(rows), number, np.int32),
                rows.astype(np.int32),
            )
        )
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ClusterBatch(space[:count], *columns)


def _mark(scores: ScoreStream, shards: list[str], batch: ClusterBatch, threshold: float) -> int:
    """Mark the near duplicates of whole clusters. Returns their number."""
    best_first = np.lexsort((batch.hashes, -batch.score, batch.mark != ALWAYS, batch.cluster))
    starts = np.flatnonzero(np.diff(batch.cluster[best_first], prepend=-1)).tolist()
    excluded = np.zeros(len(best_first), bool)
    for start, stop in zip(starts, [*starts[1:], len(best_first)], strict=True):
        rows = best_first[start:stop]
        vectors = near.unit_vectors(batch.embedding[rows])
        excluded[rows] = near.redundant(vectors, threshold, batch.mark[rows] == ALWAYS)
    for number in np.unique(batch.shard[excluded]).tolist():
        rows = batch.row[excluded & (batch.shard == number)]
        scores.marks.add(shards[number], rows, NEVER)
    return int(excluded.sum())
