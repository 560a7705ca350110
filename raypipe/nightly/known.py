"""Which samples of new fragments were in the source before.

A fragment is new as soon as one of its files is: an image added to a folder, or rows appended to a
file, make new fragments of samples that are old. A sample is known if its id was in a fragment that
is gone now; the snapshot of the night before still has the scores of those.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.nightly.sampling import order_of
from raypipe.runs.run import Run
from raypipe.runs.snapshots import SnapshotManifest, file_uri

TOLERANCE = 1e-3
"""Difference of two scores of the same image, in standard deviations: networks round."""


@dataclass(frozen=True)
class SinceSeed:
    """Samples that came after the seed set.

    Attributes
    ----------
    orders : mapping of str to numpy.ndarray or None
        For each fragment that is not of the baseline, `order_of` its samples that came after the
        seed set, uint64; None for all of them.
    baseline : collection of str
        Fragments of the run before its first night.
    """

    orders: Mapping[str, np.ndarray | None]
    baseline: Collection[str]

    @classmethod
    def from_table(cls, table: pa.Table, baseline: Collection[str]) -> SinceSeed:
        """Restore what `as_table` returned. Fragments that it does not name are new as a whole."""
        orders: dict[str, np.ndarray | None] = {}
        if len(table):
            fragments = table["fragment"].to_pylist()
            for name, values in zip(fragments, table["orders"].to_pylist(), strict=True):
                orders[name] = np.array(values, np.uint64)
        return cls(orders, baseline)

    def as_table(self) -> pa.Table:
        """Return the fragments that have both kinds of samples: fragment and orders."""
        mixed = {name: value for name, value in self.orders.items() if value is not None}
        columns = {
            "fragment": pa.array(mixed, pa.string()),
            "orders": pa.array([value.tolist() for value in mixed.values()], pa.list_(pa.uint64())),
        }
        return pa.table(columns)

    def contain(self, fragment: str, orders: np.ndarray) -> np.ndarray:
        """Return which samples of a fragment came after the seed set, bool [n]."""
        if fragment in self.baseline:
            return np.zeros(len(orders), bool)
        later = self.orders.get(fragment)
        return np.ones(len(orders), bool) if later is None else np.isin(orders, later)

    def count(self, fragment: str, samples: int) -> int:
        """Return how many of the samples of a fragment came after the seed set."""
        if fragment in self.baseline:
            return 0
        later = self.orders.get(fragment)
        return samples if later is None else len(later)


@dataclass(frozen=True)
class KnownSamples:
    """Samples of fragments that are gone, by ascending `order_of` their ids.

    Attributes
    ----------
    orders : numpy.ndarray
        uint64 [n].
    scores : numpy.ndarray
        float32 [n].
    since_seed : numpy.ndarray
        Whether they came after the seed set, bool [n].
    by_id : bool
        Whether a sample of the same id is the same sample whatever its score, because the scores
        of all samples change together.
    """

    orders: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    since_seed: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    by_id: bool = False

    @classmethod
    def read(
        cls,
        run: Run,
        previous: SnapshotManifest,
        current: Collection[str],
        since_seed: SinceSeed,
        by_id: bool,
    ) -> KnownSamples:
        """Read them from a snapshot, whose fragments `current` still exist."""
        gone = {
            entry["file"].removesuffix(".parquet"): file_uri(run, entry)
            for entry in previous["scores"]
        }
        names = [name for name in gone if name not in current]
        if not names:
            return cls(by_id=by_id)
        orders, scores, later = [], [], []
        for name, table in storage.ahead(
            lambda name: storage.read_table(gone[name], ["sample_id", "score"]), names, run.uri
        ):
            order = order_of(table["sample_id"].combine_chunks())
            orders.append(order)
            scores.append(table["score"].to_numpy())
            later.append(since_seed.contain(name, order))
        order = np.concatenate(orders)
        ascending = np.argsort(order, kind="stable")
        return cls(
            order[ascending],
            np.concatenate(scores)[ascending],
            np.concatenate(later)[ascending],
            by_id,
        )

    def __len__(self) -> int:
        return len(self.orders)

    @functools.cached_property
    def _tolerance(self) -> float:
        """Largest difference of scores that count as equal."""
        return TOLERANCE * float(self.scores.astype(np.float64).std())

    def compare(self, orders: np.ndarray, scores: np.ndarray) -> Compared:
        """Compare the samples of a fragment with those that are gone."""
        if not len(self):
            no = np.zeros(len(orders), bool)
            return Compared(no, no, no)
        position = np.minimum(np.searchsorted(self.orders, orders), len(self) - 1)
        known = self.orders[position] == orders
        distance = np.abs(self.scores[position].astype(np.float64) - scores)
        equal = distance <= self._tolerance
        same = known & (equal | self.by_id)
        return Compared(known, same, same & self.since_seed[position])


@dataclass(frozen=True)
class Compared:
    """Comparison of the samples of a fragment with those that are gone.

    Attributes
    ----------
    known : numpy.ndarray
        Whether a sample of the same id is gone, bool [n].
    same : numpy.ndarray
        Whether it also had the same score, bool [n]: then the image is the same.
    since_seed : numpy.ndarray
        Whether it is the same and came after the seed set, bool [n].
    """

    known: np.ndarray
    same: np.ndarray
    since_seed: np.ndarray
