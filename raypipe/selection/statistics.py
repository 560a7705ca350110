"""Statistics of a stream that do not depend on its order, not even in their last bit."""

from __future__ import annotations

import math

import numpy as np

BUCKET_BITS, LOWEST = 8, -149  # of the exponents of float32, subnormal ones included
BUCKETS = (128 - LOWEST) // BUCKET_BITS + 1
FRACTION_BITS = 24 - LOWEST


class ExactMoments:
    """Sum and sum of squares of float32 values by group, exact: floating-point sums would change with the order of the stream.

    Every value is a whole number times a power of two; whole numbers are added up by group and bucket of exponents. Memory: about
    1.2 kB a group. Up to 2^30 values a group.
    """

    def __init__(self, groups: int = 1) -> None:
        self.count = np.zeros(groups, np.int64)
        self._tables = np.zeros((4, groups * BUCKETS), np.int64)

    def add(self, value: np.ndarray, group: np.ndarray | None = None) -> None:
        """float32 [n] finite, and the group of each, int64 [n]; without: all in group 0."""
        place = np.zeros(len(value), np.int64) if group is None else group
        part, exponent = np.frexp(np.asarray(value, np.float32))
        bucket, shift = np.divmod(exponent.astype(np.int64) - LOWEST, BUCKET_BITS)
        whole = (part * np.float32(1 << 24)).astype(np.int64) << shift
        high, low = np.abs(whole) >> 16, np.abs(whole) & 0xFFFF
        cell = place * BUCKETS + bucket
        for table, number in zip(
            self._tables, (whole, high * high, high * low, low * low), strict=True
        ):
            np.add.at(table, cell, number)
        np.add.at(self.count, place, 1)

    def total(self, group: int = 0) -> float:
        """The sum of a group, rounded once."""
        return self._sums(group)[0] / (1 << FRACTION_BITS)

    def mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (population, ddof 0) of each group, float64 [G]; 0 where a group has no value."""
        mean, deviation = np.zeros(len(self.count)), np.zeros(len(self.count))
        for group in np.flatnonzero(self.count).tolist():
            n, (first, second) = int(self.count[group]), self._sums(group)
            mean[group] = first / (n << FRACTION_BITS)
            deviation[group] = math.sqrt(
                (n * second - first * first) / (n * n << 2 * FRACTION_BITS)
            )
        return mean, deviation

    def _sums(self, group: int) -> tuple[int, int]:
        """Sum times 2^FRACTION_BITS and sum of squares times 2^(2 FRACTION_BITS)."""
        first = second = 0
        for bucket in range(BUCKETS):
            whole, high, mixed, low = (
                int(table[group * BUCKETS + bucket]) for table in self._tables
            )
            first += whole << BUCKET_BITS * bucket
            second += ((high << 32) + (mixed << 17) + low) << 2 * BUCKET_BITS * bucket
        return first, second
