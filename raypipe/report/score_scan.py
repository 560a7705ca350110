"""Scan `scores/` for the report: figures, histograms, and the samples at both ends.

There are two passes. The first is streamed; the second reads the shards again only where their
numbers did not fit in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.report.schema import Histogram
from raypipe.runs.run import Run

CACHE_BYTES = 128 << 20
"""Numbers kept in memory between the passes, if they fit: those of about 8 million samples."""
BINS = 48
"""Bins of the histogram of all scores."""
SMALL_BINS = 24
"""Bins of the histogram of a class."""
CLASS_BINS = 240
"""Bins from which the quantiles of a class are computed."""
COARSE_BINS = 48
"""The same for sources of more than MANY_CLASSES classes, to save memory."""
MANY_CLASSES = 10_000
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MAX_LISTED_CLASSES = 30
"""Up to this many classes are listed one by one; of more, END_CLASSES from each end."""
END_CLASSES = 12
MIN_CLASS_SAMPLES = 10
"""Classes with fewer samples are not shown as extremes if enough others exist."""
CLASS_FRAGMENTS = 32
"""Fragments remembered for each class, drawn at random by a hash, and searched for its images."""
RANGE_SAMPLE = 50_000
"""Scores drawn at random to choose the range of the histograms."""


@dataclass
class Pick:
    """One sample of an image grid.

    Attributes
    ----------
    sample_id, fragment, label, score
        The sample; the label is None without one.
    lower, upper
        Ends of the score's interval; None where they are not finite.
    measured
        Whether the score was measured rather than extrapolated.
    prediction
        Class index that the proxy predicts.
    confidence
        Probability of the prediction, from 0 to 1.
    margin
        Margin of the label over the best other class; negative where the proxy contradicts it.
    """

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


class HighestPicks:
    """The `size` rows with the highest values so far."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._best: list[tuple[float, Pick]] = []

    def offer(self, values: np.ndarray, pick: Callable[[int], Pick]) -> None:
        """Consider the rows of a shard.

        Parameters
        ----------
        values
            Float [n]; NaN for rows that are not eligible.
        pick
            Returns the sample of a row.
        """
        if self._size == 0:
            return
        threshold = self._best[-1][0] if len(self._best) == self._size else -np.inf
        rows = np.flatnonzero(values > threshold)
        if len(rows) > self._size:
            rows = rows[np.argsort(-values[rows], kind="stable")[: self._size]]
        self._best += [(float(values[row]), pick(row)) for row in rows.tolist()]
        self._best.sort(key=lambda item: -item[0])
        del self._best[self._size :]

    def picks(self) -> list[Pick]:
        """Return the samples, the highest value first."""
        return [pick for _, pick in self._best]


class ClassFragments:
    """For every class, some of the fragments in which it occurs.

    They are those with the lowest hashes, so that classes of a shuffled source share them.
    Memory: 8 bytes for each class and each of CLASS_FRAGMENTS.
    """

    def __init__(self, classes: int) -> None:
        self._hashes = np.full((classes, CLASS_FRAGMENTS), np.iinfo(np.uint64).max, np.uint64)
        self._highest = self._hashes[:, 0].copy()
        self._name: dict[int, str] = {}

    def add(self, fragment: str, present: np.ndarray) -> None:
        """Add a fragment; `present` holds the index of every class that occurs in it, once."""
        place = int.from_bytes(hashlib.blake2b(fragment.encode(), digest_size=8).digest())
        better = present[self._highest[present] > np.uint64(place)]
        if not len(better):
            return
        self._name[place] = fragment
        self._hashes[better, self._hashes[better].argmax(axis=1)] = place
        self._highest[better] = self._hashes[better].max(axis=1)

    def containing(self, labels: Sequence[int], limit: int) -> list[str]:
        """Return at most `limit` fragments with these classes, one of each class in turn."""
        chosen: dict[str, None] = {}
        ranked = np.sort(self._hashes[list(labels)], axis=1)
        for place in ranked.T.ravel().tolist():
            if place in self._name and len(chosen) < limit:
                chosen[self._name[place]] = None
        return list(chosen)


@dataclass
class ScoreScan:
    """Figures of all scores. Arrays by class have a row per class and a last one for unlabelled.

    Attributes
    ----------
    classes
        Number of classes, C.
    samples, measured, not_finite
        Counts of samples.
    low, high, total
        Of the finite scores.
    class_samples, class_measured, class_sum
        [C + 1]: samples, measured samples and sum of the finite scores.
    histogram
        None until there is a finite score.
    class_counts
        [2, C + 1, bins] of extrapolated and of measured samples, between the outer edges.
    class_fragments
        Some fragments of every class.
    class_quantiles
        Class -> its score at each of QUANTILES, for the classes that have scores.
    picks
        Samples of the grids highest, lowest and uncertain.
    """

    classes: int
    samples: int = 0
    measured: int = 0
    not_finite: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    class_samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    class_measured: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    class_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    histogram: Histogram | None = None
    class_counts: np.ndarray = field(default_factory=lambda: np.zeros((2, 1, SMALL_BINS), np.int32))
    class_fragments: ClassFragments = field(default_factory=lambda: ClassFragments(0))
    class_quantiles: dict[int, list[float]] = field(default_factory=dict)
    picks: dict[str, list[Pick]] = field(default_factory=dict)

    @classmethod
    def empty(cls, classes: int) -> ScoreScan:
        """Return a scan that has read nothing."""
        rows = classes + 1
        return cls(
            classes,
            class_samples=np.zeros(rows, np.int64),
            class_measured=np.zeros(rows, np.int64),
            class_sum=np.zeros(rows),
            class_fragments=ClassFragments(rows),
        )

    def class_row(self, label: np.ndarray) -> np.ndarray:
        """Return the row of each label in the arrays by class; the last one for unlabelled."""
        return np.where((label < 0) | (label >= self.classes), self.classes, label)

    def mean_of(self, label: int) -> float | None:
        """Return the mean score of a class; None without samples."""
        samples = int(self.class_samples[label])
        return float(self.class_sum[label]) / samples if samples else None

    def by_median(self) -> list[int]:
        """Return the classes that have scores, the lowest median first."""
        middle = QUANTILES.index(0.5)
        return sorted(
            self.class_quantiles, key=lambda label: (self.class_quantiles[label][middle], label)
        )

    def class_histogram(self, label: int) -> tuple[list[int], list[int]]:
        """Return counts of measured and of extrapolated samples of a class in SMALL_BINS bins."""
        counts = self.class_counts[:, label].reshape(2, SMALL_BINS, -1).sum(axis=2, dtype=np.int64)
        return counts[1].tolist(), counts[0].tolist()


def scan_scores(run: Run, classes: int, images: int) -> ScoreScan:
    """Read `scores/`, twice if they are many; `images` is the number of samples of each grid."""
    scan, cache = ScoreScan.empty(classes), _ScoreCache(run)
    sample = _first_pass(run, scan, images, cache)
    if scan.samples > scan.not_finite:
        _second_pass(cache, scan, sample)
    return scan


def both_ends(order: Sequence[int], limit: int) -> list[int]:
    """Return everything, or `limit` items from both ends, the larger half from the start."""
    if len(order) <= limit:
        return list(order)
    return [*order[: limit - limit // 2], *order[len(order) - limit // 2 :]]


def shown_classes(scan: ScoreScan, limit: int) -> list[int]:
    """Return at most `limit` classes, the lowest median first: all, or those at both ends.

    Classes of fewer than MIN_CLASS_SAMPLES are chosen only if there are too few others.
    """
    order = scan.by_median()
    large = [label for label in order if scan.class_samples[label] >= MIN_CLASS_SAMPLES]
    return both_ends(large if len(order) > limit and len(large) >= limit else order, limit)


@dataclass(frozen=True)
class _ScoreShard:
    """A shard of `scores/`: score float64 [n], label int64 [n] (-1 without), measured bool [n]."""

    fragment: str
    table: pa.Table
    score: np.ndarray
    label: np.ndarray
    measured: np.ndarray


def _shards(run: Run, columns: list[str]) -> Iterator[_ScoreShard]:
    for file, table in storage.iter_tables(run.scores_folder, columns, threads=storage.READERS):
        yield _ScoreShard(
            file.removesuffix(".parquet"),
            table,
            table["score"].to_numpy().astype(np.float64),
            table["label"].fill_null(-1).to_numpy().astype(np.int64),
            table["measured"].fill_null(False).to_numpy(),
        )


_Numbers = tuple[np.ndarray, np.ndarray, np.ndarray]
"""score [n], label [n], measured [n] of a shard."""


class _ScoreCache:
    """The numbers of every shard, from memory or, beyond CACHE_BYTES, from the shards again."""

    def __init__(self, run: Run) -> None:
        self._run, self._bytes = run, 0
        self._shards: list[_Numbers] = []

    def add(self, shard: _ScoreShard) -> None:
        numbers = shard.score, shard.label, shard.measured
        self._bytes += sum(values.nbytes for values in numbers)
        if self._bytes > CACHE_BYTES:
            self._shards.clear()
        else:
            self._shards.append(numbers)

    def __iter__(self) -> Iterator[_Numbers]:
        if self._bytes <= CACHE_BYTES:
            yield from self._shards
            return
        for shard in _shards(self._run, ["score", "label", "measured"]):
            yield shard.score, shard.label, shard.measured


class _RandomScores:
    """A uniform sample of the finite scores, of at least RANGE_SAMPLE if there are that many."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self.scores, self._order = np.zeros(0), np.zeros(0)

    def add(self, scores: np.ndarray) -> None:
        self.scores = np.concatenate([self.scores, scores])
        self._order = np.concatenate([self._order, self._random.random(len(scores))])
        if len(self.scores) > 2 * RANGE_SAMPLE:
            first = np.argpartition(self._order, RANGE_SAMPLE)[:RANGE_SAMPLE]
            self.scores, self._order = self.scores[first], self._order[first]


def _first_pass(run: Run, scan: ScoreScan, images: int, cache: _ScoreCache) -> np.ndarray:
    """Fill in the counts and picks; return a random sample of the scores."""
    high, low, wide = HighestPicks(images), HighestPicks(images), HighestPicks(images)
    sample = _RandomScores()
    for shard in _shards(run, ["sample_id", "score", "label", "lower", "upper", "measured"]):
        cache.add(shard)
        score, measured, finite = shard.score, shard.measured, np.isfinite(shard.score)
        _count(scan, shard, finite)
        if not finite.any():
            continue
        scan.low = min(scan.low, float(score[finite].min()))
        scan.high = max(scan.high, float(score[finite].max()))
        scan.total += float(score[finite].sum())
        sample.add(score[finite])
        lower, upper = interval_bounds(shard.table)
        pick = pick_maker(shard.fragment, shard.table, score, shard.label)
        high.offer(np.where(finite, score, np.nan), pick)
        low.offer(np.where(finite, -score, np.nan), pick)
        wide.offer(np.where(finite & ~measured & (upper > lower), upper - lower, np.nan), pick)
    scan.picks = {"highest": high.picks(), "lowest": low.picks(), "uncertain": wide.picks()}
    return sample.scores


def _count(scan: ScoreScan, shard: _ScoreShard, finite: np.ndarray) -> None:
    rows = scan.classes + 1
    row_class = scan.class_row(shard.label)
    class_samples = np.bincount(row_class, minlength=rows)
    scan.samples += len(shard.score)
    scan.measured += int(shard.measured.sum())
    scan.not_finite += int((~finite).sum())
    scan.class_samples += class_samples
    scan.class_fragments.add(shard.fragment, np.flatnonzero(class_samples))
    scan.class_measured += np.bincount(row_class[shard.measured], minlength=rows)
    scan.class_sum += np.bincount(row_class[finite], weights=shard.score[finite], minlength=rows)


def interval_bounds(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of the scores' intervals, float64 [n] each."""
    return (
        table["lower"].to_numpy().astype(np.float64),
        table["upper"].to_numpy().astype(np.float64),
    )


def pick_maker(
    fragment: str, table: pa.Table, score: np.ndarray, label: np.ndarray
) -> Callable[[int], Pick]:
    """Return the function that makes the `Pick` of a row of a score shard."""
    bounds = interval_bounds(table)

    def pick(row: int) -> Pick:
        lower, upper = (float(bound[row]) if np.isfinite(bound[row]) else None for bound in bounds)
        known = int(label[row]) if label[row] >= 0 else None
        sample_id, measured = table["sample_id"][row].as_py(), bool(table["measured"][row].as_py())
        return Pick(sample_id, fragment, known, float(score[row]), lower, upper, measured)

    return pick


def _histogram_range(scan: ScoreScan, sample: np.ndarray) -> tuple[float, float]:
    """Return the range that holds 99 % of the scores, or all of them if there are few."""
    start, stop = (float(value) for value in np.quantile(sample, (0.005, 0.995)))
    if len(sample) < 1000:
        start, stop = scan.low, scan.high
    if not stop - start > 1e-6 * max(abs(start), abs(stop)):  # (nearly) one value: widen the range
        room = 0.5 * max(abs(start), 1e-6)
        start, stop = start - room, stop + room
    return start, stop


class _BinCounter:
    """Counts values 0..bins-1, many at a time: each count takes time in proportion to `bins`."""

    def __init__(self, bins: int) -> None:
        self.counts = np.zeros(bins, np.int32)
        self._pending: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        self._pending.append(values)
        if sum(map(len, self._pending)) > max(len(self.counts), 1 << 16):
            self.flush()

    def flush(self) -> None:
        if self._pending:
            counts = np.bincount(np.concatenate(self._pending), minlength=len(self.counts))
            self.counts += counts.astype(np.int32)
            self._pending.clear()


def _second_pass(cache: _ScoreCache, scan: ScoreScan, sample: np.ndarray) -> None:
    """Fill in the histograms and the quantiles of the classes."""
    start, stop = _histogram_range(scan, sample)
    rows, bins = scan.classes + 1, CLASS_BINS if scan.classes <= MANY_CLASSES else COARSE_BINS
    counter = _BinCounter(2 * rows * bins)
    for score, label, measured in cache:
        finite = np.isfinite(score)
        place = np.clip((score[finite] - start) / (stop - start), 0, 1)
        row = scan.class_row(label)[finite] + rows * measured[finite]
        counter.add(row * bins + np.minimum((place * bins).astype(np.int64), bins - 1))
    counter.flush()
    scan.class_counts = counter.counts.reshape(2, rows, bins)
    overall = scan.class_counts.reshape(2, rows, BINS, -1).sum(axis=(1, 3), dtype=np.int64)
    scan.histogram = {
        "edges": np.linspace(start, stop, BINS + 1).tolist(),
        "measured": overall[1].tolist(),
        "extrapolated": overall[0].tolist(),
    }
    middles = start + (np.arange(bins) + 0.5) * (stop - start) / bins
    for row in range(rows):
        below = np.cumsum(scan.class_counts[:, row].sum(axis=0, dtype=np.int64))
        if below[-1]:
            scan.class_quantiles[row] = middles[
                np.searchsorted(below, np.multiply(QUANTILES, below[-1]))
            ].tolist()
