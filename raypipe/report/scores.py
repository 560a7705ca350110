"""What the report needs of `scores/`, in two streamed passes: figures, histograms, and the samples at the ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.rundir import Run

READ_AHEAD = 8
"""Score shards read at a time."""
BINS, CLASS_BINS = 48, 400
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MOST_CLASSES, END_CLASSES = 30, 12
"""So many classes are shown one by one; of more, so many from each end."""
SKETCH = 50_000
"""Scores drawn at random, from which the range of the histograms is taken."""


@dataclass
class Pick:
    """One sample of an image grid. `prediction` is the proxy's, a class index."""

    sample_id: str
    fragment: str
    label: int | None
    score: float
    lower: float | None = None
    upper: float | None = None
    measured: bool = False
    prediction: int | None = None
    margin: float | None = None


class Highest:
    """The `size` rows with the highest value seen so far."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: list[tuple[float, Pick]] = []

    def offer(self, values: np.ndarray, pick: Callable[[int], Pick]) -> None:
        """values [n], NaN for rows that are out of the question; `pick` makes the sample of a row."""
        if self._size == 0:
            return
        least = self._found[-1][0] if len(self._found) == self._size else -np.inf
        rows = np.flatnonzero(values > least)
        if len(rows) > self._size:
            rows = rows[np.argsort(-values[rows], kind="stable")[: self._size]]
        self._found += [(float(values[row]), pick(row)) for row in rows.tolist()]
        self._found.sort(key=lambda item: -item[0])
        del self._found[self._size :]

    def picks(self) -> list[Pick]:
        return [pick for _, pick in self._found]


@dataclass
class ScoreScan:
    """Figures of all scores. Arrays by class have one row per class and a last one for the unlabelled.

    histogram         edges [B + 1], counts of measured and of extrapolated samples [B]; the end bins hold all that lies beyond
    class_samples, class_measured, class_sum   [C + 1]
    class_quantiles   class -> score at each of QUANTILES, for the classes that are shown
    edge              score below which 20 % of the samples lie, about
    """

    classes: int
    samples: int = 0
    measured: int = 0
    not_finite: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    edge: float = np.nan
    class_samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    class_measured: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    class_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    histogram: dict[str, list[Any]] = field(default_factory=dict)
    class_quantiles: dict[int, list[float]] = field(default_factory=dict)
    picks: dict[str, list[Pick]] = field(default_factory=dict)

    def mean_of(self, label: int) -> float | None:
        samples = int(self.class_samples[label])
        return float(self.class_sum[label]) / samples if samples else None


def scan_scores(run: Run, classes: int, images: int) -> ScoreScan:
    """Read `scores/` twice. `images` is how many samples each grid shows."""
    scan = ScoreScan(classes)
    scan.class_samples, scan.class_measured = np.zeros(classes + 1, np.int64), np.zeros(classes + 1, np.int64)
    scan.class_sum = np.zeros(classes + 1)
    sketch = _first_pass(run, scan, images)
    if scan.samples > scan.not_finite:
        _second_pass(run, scan, sketch)
    return scan


def shown_classes(means: dict[int, float]) -> list[int]:
    """Classes to show one by one, the lowest mean score first: all, or those at the two ends."""
    order = sorted(means, key=lambda label: (means[label], label))
    return order if len(order) <= MOST_CLASSES else order[:END_CLASSES] + order[-END_CLASSES:]


def _shards(run: Run, columns: list[str]) -> Iterator[tuple[str, pa.Table, np.ndarray, np.ndarray, np.ndarray]]:
    """Fragment, table, score [n], class or -1 [n], measured [n] of every shard."""
    for file, table in storage.iter_tables(run.path("scores"), columns, threads=READ_AHEAD):
        score = table["score"].to_numpy().astype(np.float64)
        label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
        yield file.removesuffix(".parquet"), table, score, label, table["measured"].fill_null(False).to_numpy()


def _first_pass(run: Run, scan: ScoreScan, images: int) -> np.ndarray:
    """Fill in the counts and picks; returns a random sample of the scores."""
    high, low, wide = Highest(images), Highest(images), Highest(images)
    random = np.random.default_rng(0)
    drawn, order = np.zeros(0), np.zeros(0)
    for fragment, table, score, label, measured in _shards(run, ["sample_id", "score", "label", "lower", "upper", "measured"]):
        finite = np.isfinite(score)
        scan.samples += len(score)
        scan.measured += int(measured.sum())
        scan.not_finite += int((~finite).sum())
        row_class = np.where((label < 0) | (label >= scan.classes), scan.classes, label)
        scan.class_samples += np.bincount(row_class, minlength=scan.classes + 1)
        scan.class_measured += np.bincount(row_class[measured], minlength=scan.classes + 1)
        scan.class_sum += np.bincount(row_class[finite], weights=score[finite], minlength=scan.classes + 1)
        if not finite.any():
            continue
        scan.low, scan.high = min(scan.low, float(score[finite].min())), max(scan.high, float(score[finite].max()))
        scan.total += float(score[finite].sum())
        drawn, order = np.concatenate([drawn, score[finite]]), np.concatenate([order, random.random(int(finite.sum()))])
        if len(drawn) > 2 * SKETCH:
            first = np.argpartition(order, SKETCH)[:SKETCH]
            drawn, order = drawn[first], order[first]
        lower, upper = (table[name].to_numpy().astype(np.float64) for name in ("lower", "upper"))
        pick = _picker(fragment, table, score, label, [lower, upper])
        high.offer(np.where(finite, score, np.nan), pick)
        low.offer(np.where(finite, -score, np.nan), pick)
        wide.offer(np.where(finite & ~measured & (upper > lower), upper - lower, np.nan), pick)
    scan.picks = {"highest": high.picks(), "lowest": low.picks(), "uncertain": wide.picks()}
    return drawn


def _picker(
    fragment: str, table: pa.Table, score: np.ndarray, label: np.ndarray, bounds: list[np.ndarray]
) -> Callable[[int], Pick]:
    def pick(row: int) -> Pick:
        lower, upper = (float(bound[row]) if np.isfinite(bound[row]) else None for bound in bounds)
        known = int(label[row]) if label[row] >= 0 else None
        sample_id, measured = table["sample_id"][row].as_py(), bool(table["measured"][row].as_py())
        return Pick(sample_id, fragment, known, float(score[row]), lower, upper, measured)

    return pick


def _second_pass(run: Run, scan: ScoreScan, sketch: np.ndarray) -> None:
    """Fill in the histograms and the quantiles of the shown classes."""
    start, stop = (float(value) for value in np.quantile(sketch, (0.005, 0.995)))
    if len(sketch) < 1000:
        start, stop = scan.low, scan.high
    if not stop - start > 1e-6 * max(abs(start), abs(stop)):  # (nearly) one value: give it room
        room = 0.5 * max(abs(start), 1e-6)
        start, stop = start - room, stop + room
    scan.edge = float(np.quantile(sketch, 0.2))
    means = {label: mean for label in range(scan.classes + 1) if (mean := scan.mean_of(label)) is not None}
    shown = np.array(sorted(shown_classes(means)), np.int64)
    row_of = np.full(scan.classes + 1, -1, np.int64)
    row_of[shown] = np.arange(len(shown))
    counts = np.zeros((2, BINS), np.int64)
    by_class = np.zeros((len(shown), CLASS_BINS), np.int64)
    for _, _, score, label, measured in _shards(run, ["score", "label", "measured"]):
        finite = np.isfinite(score)
        place = np.clip((score[finite] - start) / (stop - start), 0, 1)
        bins = np.minimum((place * BINS).astype(np.int64), BINS - 1)
        for kind in (0, 1):
            counts[kind] += np.bincount(bins[measured[finite] == bool(kind)], minlength=BINS)
        row = row_of[np.where((label < 0) | (label >= scan.classes), scan.classes, label)[finite]]
        fine = np.minimum((place * CLASS_BINS).astype(np.int64), CLASS_BINS - 1)
        np.add.at(by_class, (row[row >= 0], fine[row >= 0]), 1)
    scan.histogram = {
        "edges": np.linspace(start, stop, BINS + 1).tolist(),
        "measured": counts[1].tolist(),
        "extrapolated": counts[0].tolist(),
    }
    middles = start + (np.arange(CLASS_BINS) + 0.5) * (stop - start) / CLASS_BINS
    for label, histogram in zip(shown.tolist(), by_class, strict=True):
        if histogram.sum():
            below = np.cumsum(histogram) / histogram.sum()
            scan.class_quantiles[label] = [float(middles[np.searchsorted(below, q)]) for q in QUANTILES]
