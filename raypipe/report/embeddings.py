"""Scan `embeddings/`: a map of a bounded sample, and samples whose label the proxy contradicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.errors import RaypipeError
from raypipe.report.label_doubt import label_doubt
from raypipe.report.label_noise import LabelNoiseCounter, NoiseCounts
from raypipe.report.score_scan import HighestPicks, Pick
from raypipe.runs.run import Run
from raypipe.sources.noise import LabelNoise

T = TypeVar("T")

MAX_SHARDS = 256
"""Shards that are searched for contradicted labels, evenly spread over the source."""
MAP_SHARDS = 32
"""Shards from which the map is drawn, evenly spread over the source."""
MAP_SAMPLES = 3000
"""Samples on the map, about."""


@dataclass(frozen=True)
class EmbeddingMap:
    """The first two principal components of some embeddings.

    Attributes
    ----------
    position
        [n, 2].
    score
        [n].
    explained
        Share of the variance along each axis.
    rows
        [n]: which of the given embeddings are on the map; those that are not finite are left out.
    sample_id
        [n].
    kept
        bool [n]: whether a keep-list holds the sample; None without one.
    """

    position: np.ndarray
    score: np.ndarray
    explained: tuple[float, float]
    rows: np.ndarray
    sample_id: Sequence[str] = ()
    kept: np.ndarray | None = None

    def table(self) -> pa.Table:
        """Return a row for each point: sample_id, x, y, score, kept."""
        kept = pa.nulls(len(self.score), pa.bool_()) if self.kept is None else pa.array(self.kept)
        numbers = [pa.array(column.astype(np.float32)) for column in (*self.position.T, self.score)]
        ids = pa.array(list(self.sample_id), pa.string())
        return pa.table([ids, *numbers, kept], names=["sample_id", "x", "y", "score", "kept"])


@dataclass(frozen=True)
class EmbeddingScan:
    """The result of reading `shards_read` of all `shards` of embeddings.

    Attributes
    ----------
    map
        None where there is nothing to project.
    suspects
        The samples whose label the proxy contradicts most.
    suspect_count
        All such samples.
    agreement
        Share of the labelled samples for which the proxy predicts the label; None without any.
    shards_read, shards
        Shards that were searched, and all of them.
    noise
        In a run with replaced labels, how well the whole list of suspects finds them; see
        `raypipe.report.label_noise`.
    """

    map: EmbeddingMap | None
    suspects: list[Pick]
    suspect_count: int
    agreement: float | None
    shards_read: int
    shards: int
    noise: NoiseCounts | None = None


def scan_embeddings(run: Run, images: int, noise: LabelNoise | None = None) -> EmbeddingScan:
    """Read some embedding shards.

    Parameters
    ----------
    run
        The run whose embeddings and scores are read.
    images
        The largest number of suspects to return.
    noise
        Labels that were replaced to test the detection of label noise.
    """
    counter = LabelNoiseCounter(noise) if noise is not None else None
    fragments = sorted(run.done("embeddings") & run.done("scores"))
    suspects, on_map = _Suspects(images), set(spread(fragments, MAP_SHARDS))
    points, read = _MapPoints(max(1, MAP_SAMPLES // max(1, len(on_map)))), 0
    for fragment in spread(fragments, MAX_SHARDS):
        try:
            shard = _read_shard(run, fragment, with_embedding=fragment in on_map)
        except (RaypipeError, OSError):
            # a damaged shard concerns the stage that wrote it; the page says how many were read
            continue
        read += 1
        doubt = suspects.add(shard)
        if counter is not None:
            counter.add(shard.table["sample_id"].to_pylist(), shard.label, doubt)
        if fragment in on_map and len(shard.table):
            points.add(shard)
    return EmbeddingScan(
        points.project(),
        suspects.picks(),
        suspects.count,
        suspects.agreed / suspects.labelled if suspects.labelled else None,
        read,
        len(fragments),
        counter.counts() if counter is not None else None,
    )


@dataclass(frozen=True)
class _EmbeddingShard:
    """An embedding shard with the scores of its samples.

    `label` and `prediction` are -1 and `score` is NaN where they are unknown.
    """

    fragment: str
    table: pa.Table
    label: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray
    margin: np.ndarray
    score: np.ndarray
    measured: np.ndarray


def _read_shard(run: Run, fragment: str, *, with_embedding: bool) -> _EmbeddingShard:
    columns = ["sample_id", "label", "prediction", "confidence", "margin"]
    if with_embedding:
        columns.append("embedding")
    table = storage.read_table(run.embedding_shard(fragment), columns)
    scores = storage.read_table(run.score_shard(fragment), ["sample_id", "score", "measured"])
    score, measured = _aligned(table["sample_id"], scores)
    return _EmbeddingShard(
        fragment,
        table,
        table["label"].fill_null(-1).to_numpy(),
        table["prediction"].fill_null(-1).to_numpy(),
        table["confidence"].to_numpy().astype(np.float64),
        table["margin"].to_numpy().astype(np.float64),
        score,
        measured,
    )


class _Suspects:
    """Finds the samples whose label the proxy contradicts, by its margin, whatever their score.

    A condition on the score loses wrong labels: on CIFAR-10 with a fifth of the labels replaced, of
    as many samples as were replaced, the margin of a proxy trained on all of them found 58 %, and
    that of the three weaker proxies of a run by default 40 to 46 % (docs/results/label-noise.md).
    """

    def __init__(self, images: int) -> None:
        self._best = HighestPicks(images)
        self.count = self.agreed = self.labelled = 0

    def add(self, shard: _EmbeddingShard) -> np.ndarray:
        """Return `label_doubt` of the shard."""
        label, prediction = shard.label, shard.prediction
        labelled = (label >= 0) & (prediction >= 0)
        doubt = label_doubt(label, prediction, shard.margin)
        self._best.offer(doubt, _suspect_maker(shard))
        self.count += int(np.isfinite(doubt).sum())
        self.agreed += int((labelled & (label == prediction)).sum())
        self.labelled += int(labelled.sum())
        return doubt

    def picks(self) -> list[Pick]:
        return self._best.picks()


def _suspect_maker(shard: _EmbeddingShard) -> Callable[[int], Pick]:
    """Return the function that makes the `Pick` of a row."""

    def pick(row: int) -> Pick:
        return Pick(
            shard.table["sample_id"][row].as_py(),
            shard.fragment,
            int(shard.label[row]),
            float(shard.score[row]),
            measured=bool(shard.measured[row]),
            prediction=int(shard.prediction[row]),
            confidence=float(shard.confidence[row]),
            margin=float(shard.margin[row]),
        )

    return pick


class _MapPoints:
    """Collects the samples of the map, at most `per_shard` of each shard, evenly spread."""

    def __init__(self, per_shard: int) -> None:
        self._per_shard = per_shard
        self._vectors: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._ids: list[str] = []

    def add(self, shard: _EmbeddingShard) -> None:
        last = len(shard.table) - 1
        rows = np.unique(np.linspace(0, last, self._per_shard).astype(np.int64))
        vectors = storage.matrix_of(shard.table["embedding"])[rows]
        self._vectors.append(vectors.astype(np.float32))
        self._scores.append(shard.score[rows])
        self._ids += shard.table["sample_id"].take(pa.array(rows)).to_pylist()

    def project(self) -> EmbeddingMap | None:
        if not self._vectors:
            return None
        projected = principal_axes(np.concatenate(self._vectors), np.concatenate(self._scores))
        if projected is None:
            return None
        return replace(projected, sample_id=[self._ids[row] for row in projected.rows])


def principal_axes(vectors: np.ndarray, score: np.ndarray) -> EmbeddingMap | None:
    """Project vectors [n, d] onto the two directions of largest variance.

    Return None for fewer than three points or two dimensions, and for vectors that do not vary.
    """
    finite = np.isfinite(vectors).all(axis=1) & np.isfinite(score)
    vectors, score = vectors[finite], score[finite]
    if len(vectors) < 3 or vectors.shape[1] < 2:
        return None
    centred = vectors - vectors.mean(axis=0)
    variance = float(np.square(centred).sum())
    if variance == 0:
        return None
    # both Gram matrices have the same nonzero eigenvalues; take the smaller one
    wide = len(centred) < centred.shape[1]
    values, axes = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values = np.maximum(values[[-1, -2]], 0)
    leading = axes[:, [-1, -2]]
    position = leading * np.sqrt(values) if wide else centred @ leading
    # eigenvectors have no sign: make the largest coordinate of each axis positive
    largest = position[np.abs(position).argmax(axis=0), [0, 1]]
    position = position * np.where(largest < 0, -1, 1)
    explained = float(values[0]) / variance, float(values[1]) / variance
    return EmbeddingMap(position, score, explained, np.flatnonzero(finite))


def spread(items: list[T], limit: int) -> list[T]:
    """Return at most `limit` items, evenly spread."""
    if len(items) <= limit:
        return items
    return [items[position] for position in np.linspace(0, len(items) - 1, limit).astype(int)]


def _aligned(ids: pa.ChunkedArray, scores: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return score (NaN for an id without one) and measured, in the order of `ids`."""
    score = scores["score"].to_numpy().astype(np.float64)
    measured = scores["measured"].fill_null(False).to_numpy()
    scored = scores["sample_id"]
    if scored.equals(ids):
        return score, measured
    place = {sample_id: row for row, sample_id in enumerate(scored.to_pylist())}
    rows = np.array([place.get(sample_id, len(scored)) for sample_id in ids.to_pylist()], np.int64)
    return np.append(score, np.nan)[rows], np.append(measured, False)[rows]
