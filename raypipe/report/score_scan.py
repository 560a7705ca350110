"""What the report needs of `scores/`, in two passes, the first streamed: figures, histograms, and the samples at the ends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.runs.layout import Run

HELD_BYTES = 128 << 20
"""Numbers that stay in memory from the first pass to the second, if all are no more: of about eight million samples."""
BINS, SMALL_BINS = 48, 24
"""Bins of the histogram of all scores, and of that of a class."""
CLASS_BINS, COARSE_BINS, MANY_CLASSES = 240, 48, 10_000
"""Bins that the quantiles of a class come from; of more than so many classes the coarse ones, for the memory."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MOST_CLASSES, END_CLASSES = 30, 12
"""So many classes are listed one by one; of more, so many from each end."""
FEW = 10
"""Classes with fewer samples are no extremes, where there are enough others."""
CLASS_FRAGMENTS = 32
"""Fragments of a class that are remembered, drawn at random by a hash, and that are searched for images of classes."""
SKETCH = 50_000
"""Scores drawn at random, from which the range of the histograms is taken."""


@dataclass
class Pick:
    """One sample of an image grid. `prediction` is the proxy's, a class index, of which it is as sure as `confidence` says, from 0 to 1."""

    sample_id: str
    fragment: str
    label: int | None
    score: float
    lower: float | None = None
    upper: float | None = None
    measured: bool = False
    prediction: int | None = None
    confidence: float | None = None
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
    class_counts      [2, C + 1, bins] of extrapolated and of measured samples, between the first and the last edge
    class_quantiles   class -> score at each of QUANTILES, for the classes that have scores
    edges             scores below which 20 % and above which 20 % of the samples lie, about
    """

    classes: int
    samples: int = 0
    measured: int = 0
    not_finite: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    edges: tuple[float, float] = (np.nan, np.nan)
    class_samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    class_measured: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    class_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    histogram: dict[str, list[Any]] = field(default_factory=dict)
    class_counts: np.ndarray = field(default_factory=lambda: np.zeros((2, 1, SMALL_BINS), np.int32))
    class_fragments: ClassFragments = field(default_factory=lambda: ClassFragments(0))
    class_quantiles: dict[int, list[float]] = field(default_factory=dict)
    picks: dict[str, list[Pick]] = field(default_factory=dict)

    def mean_of(self, label: int) -> float | None:
        samples = int(self.class_samples[label])
        return float(self.class_sum[label]) / samples if samples else None

    def by_median(self) -> list[int]:
        """Classes that have scores, that of the lowest median first."""
        middle = QUANTILES.index(0.5)
        return sorted(
            self.class_quantiles, key=lambda label: (self.class_quantiles[label][middle], label)
        )

    def class_histogram(self, label: int) -> dict[str, list[int]]:
        """Counts of measured and of extrapolated samples of a class in SMALL_BINS bins between the edges of `histogram`."""
        counts = self.class_counts[:, label].reshape(2, SMALL_BINS, -1).sum(axis=2, dtype=np.int64)
        return {"measured": counts[1].tolist(), "extrapolated": counts[0].tolist()}


class ClassFragments:
    """For every class some of the fragments it occurs in, those of the lowest hash: the same in all classes of a shuffled source.

    Memory: 8 bytes for each class and each of CLASS_FRAGMENTS.
    """

    def __init__(self, classes: int) -> None:
        self._found = np.full((classes, CLASS_FRAGMENTS), np.iinfo(np.uint64).max, np.uint64)
        self._worst = self._found[:, 0].copy()
        self._name: dict[int, str] = {}

    def add(self, fragment: str, present: np.ndarray) -> None:
        """present: indices of the classes that the fragment has, each once."""
        place = int.from_bytes(hashlib.blake2b(fragment.encode(), digest_size=8).digest())
        better = present[self._worst[present] > np.uint64(place)]
        if not len(better):
            return
        self._name[place] = fragment
        self._found[better, self._found[better].argmax(axis=1)] = place
        self._worst[better] = self._found[better].max(axis=1)

    def of(self, labels: Sequence[int], most: int) -> list[str]:
        """At most so many fragments in which these classes occur, one of each class in turn."""
        chosen: dict[str, None] = {}
        ranked = np.sort(self._found[list(labels)], axis=1)
        for place in ranked.T.ravel().tolist():
            if place in self._name and len(chosen) < most:
                chosen[self._name[place]] = None
        return list(chosen)


def scan_scores(run: Run, classes: int, images: int) -> ScoreScan:
    """Read `scores/`, twice where there are many. `images` is how many samples each grid shows."""
    scan = ScoreScan(classes)
    scan.class_samples, scan.class_measured = (
        np.zeros(classes + 1, np.int64),
        np.zeros(classes + 1, np.int64),
    )
    scan.class_sum = np.zeros(classes + 1)
    scan.class_fragments = ClassFragments(classes + 1)
    numbers = _Numbers(run)
    sketch = _first_pass(run, scan, images, numbers)
    if scan.samples > scan.not_finite:
        _second_pass(numbers, scan, sketch)
    return scan


def ends(order: Sequence[int], most: int) -> list[int]:
    """All of them, or `most` from both ends, the larger half from the start."""
    return (
        list(order)
        if len(order) <= most
        else [*order[: most - most // 2], *order[len(order) - most // 2 :]]
    )


def shown_classes(scan: ScoreScan, most: int) -> list[int]:
    """At most so many classes, the lowest median first: all, or those at the two ends; classes of very few samples only where need be."""
    order = scan.by_median()
    large = [label for label in order if scan.class_samples[label] >= FEW]
    return ends(large if len(order) > most and len(large) >= most else order, most)


def _shards(
    run: Run, columns: list[str]
) -> Iterator[tuple[str, pa.Table, np.ndarray, np.ndarray, np.ndarray]]:
    """Fragment, table, score [n], class or -1 [n], measured [n] of every shard."""
    for file, table in storage.iter_tables(run.path("scores"), columns, threads=storage.READERS):
        score = table["score"].to_numpy().astype(np.float64)
        label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
        yield (
            file.removesuffix(".parquet"),
            table,
            score,
            label,
            table["measured"].fill_null(False).to_numpy(),
        )


class _Numbers:
    """Score [n], class or -1 [n] and measured [n] of every shard; they are read again where they did not stay in memory."""

    def __init__(self, run: Run) -> None:
        self._run, self._bytes = run, 0
        self._held: list[tuple[np.ndarray, ...]] = []

    def hold(self, *numbers: np.ndarray) -> None:
        self._bytes += sum(values.nbytes for values in numbers)
        if self._bytes > HELD_BYTES:
            self._held.clear()
        else:
            self._held.append(numbers)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        if self._bytes <= HELD_BYTES:
            yield from self._held
            return
        for _, _, *numbers in _shards(self._run, ["score", "label", "measured"]):
            yield tuple(numbers)


def _first_pass(run: Run, scan: ScoreScan, images: int, numbers: _Numbers) -> np.ndarray:
    """Fill in the counts and picks; returns a random sample of the scores."""
    high, low, wide = Highest(images), Highest(images), Highest(images)
    random = np.random.default_rng(0)
    drawn, order = np.zeros(0), np.zeros(0)
    for fragment, table, score, label, measured in _shards(
        run, ["sample_id", "score", "label", "lower", "upper", "measured"]
    ):
        numbers.hold(score, label, measured)
        finite = np.isfinite(score)
        scan.samples += len(score)
        scan.measured += int(measured.sum())
        scan.not_finite += int((~finite).sum())
        row_class = np.where((label < 0) | (label >= scan.classes), scan.classes, label)
        here = np.bincount(row_class, minlength=scan.classes + 1)
        scan.class_samples += here
        scan.class_fragments.add(fragment, np.flatnonzero(here))
        scan.class_measured += np.bincount(row_class[measured], minlength=scan.classes + 1)
        scan.class_sum += np.bincount(
            row_class[finite], weights=score[finite], minlength=scan.classes + 1
        )
        if not finite.any():
            continue
        scan.low, scan.high = (
            min(scan.low, float(score[finite].min())),
            max(scan.high, float(score[finite].max())),
        )
        scan.total += float(score[finite].sum())
        drawn, order = (
            np.concatenate([drawn, score[finite]]),
            np.concatenate([order, random.random(int(finite.sum()))]),
        )
        if len(drawn) > 2 * SKETCH:
            first = np.argpartition(order, SKETCH)[:SKETCH]
            drawn, order = drawn[first], order[first]
        lower, upper = (table[name].to_numpy().astype(np.float64) for name in ("lower", "upper"))
        pick = picker(fragment, table, score, label, [lower, upper])
        high.offer(np.where(finite, score, np.nan), pick)
        low.offer(np.where(finite, -score, np.nan), pick)
        wide.offer(np.where(finite & ~measured & (upper > lower), upper - lower, np.nan), pick)
    scan.picks = {"highest": high.picks(), "lowest": low.picks(), "uncertain": wide.picks()}
    return drawn


def picker(
    fragment: str, table: pa.Table, score: np.ndarray, label: np.ndarray, bounds: list[np.ndarray]
) -> Callable[[int], Pick]:
    """What makes the `Pick` of a row."""

    def pick(row: int) -> Pick:
        lower, upper = (float(bound[row]) if np.isfinite(bound[row]) else None for bound in bounds)
        known = int(label[row]) if label[row] >= 0 else None
        sample_id, measured = table["sample_id"][row].as_py(), bool(table["measured"][row].as_py())
        return Pick(sample_id, fragment, known, float(score[row]), lower, upper, measured)

    return pick


def _second_pass(numbers: _Numbers, scan: ScoreScan, sketch: np.ndarray) -> None:
    """Fill in the histograms and the quantiles of the classes."""
    start, stop = (float(value) for value in np.quantile(sketch, (0.005, 0.995)))
    if len(sketch) < 1000:
        start, stop = scan.low, scan.high
    if not stop - start > 1e-6 * max(abs(start), abs(stop)):  # (nearly) one value: give it room
        room = 0.5 * max(abs(start), 1e-6)
        start, stop = start - room, stop + room
    scan.edges = float(np.quantile(sketch, 0.2)), float(np.quantile(sketch, 0.8))
    bins = CLASS_BINS if scan.classes <= MANY_CLASSES else COARSE_BINS
    counts = np.zeros((2, scan.classes + 1, bins), np.int32)
    flat, waiting = counts.reshape(-1), list[np.ndarray]()

    def count() -> None:
        """Many at a time: each time takes as long as there are bins."""
        if waiting:
            flat[:] += np.bincount(np.concatenate(waiting), minlength=len(flat)).astype(np.int32)
            waiting.clear()

    for score, label, measured in numbers:
        finite = np.isfinite(score)
        place = np.clip((score[finite] - start) / (stop - start), 0, 1)
        row = np.where((label < 0) | (label >= scan.classes), scan.classes, label)[finite]
        row += (scan.classes + 1) * measured[finite]
        waiting.append(row * bins + np.minimum((place * bins).astype(np.int64), bins - 1))
        if sum(map(len, waiting)) > max(len(flat), 1 << 16):
            count()
    count()
    overall = counts.reshape(2, scan.classes + 1, BINS, -1).sum(axis=(1, 3), dtype=np.int64)
    scan.class_counts = counts
    scan.histogram = {
        "edges": np.linspace(start, stop, BINS + 1).tolist(),
        "measured": overall[1].tolist(),
        "extrapolated": overall[0].tolist(),
    }
    middles = start + (np.arange(bins) + 0.5) * (stop - start) / bins
    for row_of in range(scan.classes + 1):
        below = np.cumsum(counts[:, row_of].sum(axis=0, dtype=np.int64))
        if below[-1]:
            scan.class_quantiles[row_of] = middles[
                np.searchsorted(below, np.multiply(QUANTILES, below[-1]))
            ].tolist()
