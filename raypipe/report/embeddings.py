"""What the report takes from `embeddings/`: a map of a bounded sample, and samples whose label the proxy contradicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.errors import RaypipeError
from raypipe.report.label_noise import LabelNoiseCounter
from raypipe.report.score_scan import Highest, Pick
from raypipe.runs.layout import Run
from raypipe.sources.noise import LabelNoise

MOST_SHARDS, MAP_SHARDS, MAP_SAMPLES = 256, 32, 3000
"""Shards searched for contradicted labels; shards and samples drawn on the map. Both are evenly spread over the source."""


@dataclass(frozen=True)
class EmbeddingMap:
    """Two principal components of some embeddings.

    position   [n, 2]
    score      [n]
    explained  share of the variance along each axis
    rows       [n], those of the embeddings given that are drawn: without the ones that are not finite
    sample_id  [n]
    kept       bool [n], whether a keep-list holds the sample; None without one
    """

    position: np.ndarray
    score: np.ndarray
    explained: tuple[float, float]
    rows: np.ndarray
    sample_id: Sequence[str] = ()
    kept: np.ndarray | None = None

    def table(self) -> pa.Table:
        """One row for each point: sample_id, x, y, score, kept."""
        kept = pa.nulls(len(self.score), pa.bool_()) if self.kept is None else pa.array(self.kept)
        numbers = [pa.array(column.astype(np.float32)) for column in (*self.position.T, self.score)]
        ids = pa.array(list(self.sample_id), pa.string())
        return pa.table([ids, *numbers, kept], names=["sample_id", "x", "y", "score", "kept"])


@dataclass(frozen=True)
class EmbeddingScan:
    """shards_read of shards_there were searched for samples of a suspicious score and a label that the proxy contradicts.

    suspects  those that it contradicts most
    found     how many there are
    agreed    share of the labelled samples searched in which the proxy sees the class of the label; None without any
    noise     of a rehearsal with replaced labels how many of these the whole list of suspects finds: see `raypipe.report.label_noise`
    """

    map: EmbeddingMap | None
    suspects: list[Pick]
    found: int
    agreed: float | None
    shards_read: int
    shards_there: int
    noise: dict[str, Any] | None = None


def scan_embeddings(
    run: Run, edge: float, images: int, noise: LabelNoise | None = None, above: bool = False
) -> EmbeddingScan:
    """`edge` is the score below which, or `above` which, a sample is suspicious; `images` is how many suspects are wanted at most."""
    judge = LabelNoiseCounter(noise) if noise is not None else None
    there = sorted(run.done("embeddings") & run.done("scores"))
    chosen, mapped = _spread(there, MOST_SHARDS), set(_spread(there, MAP_SHARDS))
    most_doubtful, vectors, scores, ids, read = Highest(images), [], [], list[str](), 0
    counts = np.zeros(3, np.int64)
    for fragment in chosen:
        columns = ["sample_id", "label", "prediction", "confidence", "margin"] + ["embedding"] * (
            fragment in mapped
        )
        try:
            table = storage.read_table(run.path("embeddings", f"{fragment}.parquet"), columns)
            score_table = storage.read_table(
                run.path("scores", f"{fragment}.parquet"), ["sample_id", "score", "measured"]
            )
        except (RaypipeError, OSError):
            continue  # a damaged shard is the business of the stage that wrote it; the page says how many were read
        read += 1
        score, measured = _aligned(table["sample_id"], score_table)
        doubt, found_there = _offer_suspects(
            most_doubtful, fragment, table, score, measured, (edge, above)
        )
        counts += found_there
        if judge is not None:
            judge.add(
                table["sample_id"].to_pylist(), table["label"].fill_null(-1).to_numpy(), doubt
            )
        if fragment in mapped and len(table):
            rows = np.unique(
                np.linspace(0, len(table) - 1, max(1, MAP_SAMPLES // len(mapped))).astype(np.int64)
            )
            vectors.append(_matrix(table["embedding"])[rows])
            scores.append(score[rows])
            ids += table["sample_id"].take(pa.array(rows)).to_pylist()
    drawn = principal_axes(np.concatenate(vectors), np.concatenate(scores)) if vectors else None
    if drawn is not None:
        drawn = replace(drawn, sample_id=[ids[row] for row in drawn.rows])
    found, agreed, labelled = counts.tolist()
    share, noisy = (
        agreed / labelled if labelled else None,
        judge.figures() if judge is not None else None,
    )
    return EmbeddingScan(drawn, most_doubtful.picks(), found, share, read, len(there), noisy)


def principal_axes(vectors: np.ndarray, score: np.ndarray) -> EmbeddingMap | None:
    """Project [n, d] onto the two directions of largest variance; None where there are not two."""
    good = np.isfinite(vectors).all(axis=1) & np.isfinite(score)
    vectors, score = vectors[good], score[good]
    if len(vectors) < 3 or vectors.shape[1] < 2:
        return None
    centred = vectors - vectors.mean(axis=0)
    spread = float(np.square(centred).sum())
    if spread == 0:
        return None
    # the smaller of the two Gram matrices has the same nonzero eigenvalues
    wide = len(centred) < centred.shape[1]
    values, axes = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values = np.maximum(values[[-1, -2]], 0)
    leading = axes[:, [-1, -2]]
    position = leading * np.sqrt(values) if wide else centred @ leading
    position = position * np.where(
        position[np.abs(position).argmax(axis=0), [0, 1]] < 0, -1, 1
    )  # a sign that does not vary
    return EmbeddingMap(
        position,
        score,
        (float(values[0]) / spread, float(values[1]) / spread),
        np.flatnonzero(good),
    )


def _spread(items: list[str], most: int) -> list[str]:
    if len(items) <= most:
        return items
    return [items[position] for position in np.linspace(0, len(items) - 1, most).astype(int)]


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(column), -1)


def _aligned(ids: pa.ChunkedArray, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Score (NaN where there is none) and measured, in the order of `ids`."""
    score, measured = (
        table["score"].to_numpy().astype(np.float64),
        table["measured"].fill_null(False).to_numpy(),
    )
    known = table["sample_id"]
    if known.equals(ids):
        return score, measured
    place = {sample_id: row for row, sample_id in enumerate(known.to_pylist())}
    rows = np.array([place.get(sample_id, len(known)) for sample_id in ids.to_pylist()], np.int64)
    return np.append(score, np.nan)[rows], np.append(measured, False)[rows]


def _offer_suspects(
    best: Highest,
    fragment: str,
    table: pa.Table,
    score: np.ndarray,
    measured: np.ndarray,
    edge: tuple[float, bool],
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """How much the proxy contradicts the label, float [n], by which suspects are ordered, NaN of other samples; and how many
    suspects there are, how many labels the proxy agrees with, and how many labelled samples there are."""
    label = table["label"].fill_null(-1).to_numpy()
    prediction = table["prediction"].fill_null(-1).to_numpy()
    confidence, margin = (
        table[name].to_numpy().astype(np.float64) for name in ("confidence", "margin")
    )
    beyond = score >= edge[0] if edge[1] else score <= edge[0]
    doubtful = (
        (label >= 0) & (prediction >= 0) & (label != prediction) & beyond & np.isfinite(margin)
    )

    def pick(row: int) -> Pick:
        return Pick(
            table["sample_id"][row].as_py(), fragment, int(label[row]), float(score[row]), measured=bool(measured[row]),
            prediction=int(prediction[row]), confidence=float(confidence[row]), margin=float(margin[row]),
        )  # fmt: skip

    doubt = np.where(doubtful, -margin, np.nan)
    best.offer(doubt, pick)
    labelled = (label >= 0) & (prediction >= 0)
    return doubt, (
        int(doubtful.sum()),
        int((labelled & (label == prediction)).sum()),
        int(labelled.sum()),
    )
