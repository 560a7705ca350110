"""Statistics of a stream that do not depend on its order, not even in the last bit."""

from __future__ import annotations

import math

import numpy as np

BUCKET_BITS, LOWEST = 8, -149
"""Exponents per bucket, and the lowest exponent of a float32, subnormal numbers included."""
BUCKETS = (128 - LOWEST) // BUCKET_BITS + 1
FRACTION_BITS = 24 - LOWEST


class ExactMoments:
    """Exact sum and sum of squares of float32 values by group.

    Floating-point sums would change with the order of the stream. Every float32 is a whole number
    times a power of two; the whole numbers are added up by group and by bucket of exponents.
    Memory: about 1.2 kB per group. A group can have up to 2^30 values.
    """

    def __init__(self, groups: int = 1) -> None:
        self.count = np.zeros(groups, np.int64)
        self._tables = np.zeros((4, groups * BUCKETS), np.int64)

    def add(self, value: np.ndarray, group: np.ndarray | None = None) -> None:
        """Add finite values, float32 [n], to their groups, int64 [n]; without groups to group 0."""
        group = np.zeros(len(value), np.int64) if group is None else group
        mantissa, exponent = np.frexp(np.asarray(value, np.float32))
        bucket, shift = np.divmod(exponent.astype(np.int64) - LOWEST, BUCKET_BITS)
        whole = (mantissa * np.float32(1 << 24)).astype(np.int64) << shift
        high, low = np.abs(whole) >> 16, np.abs(whole) & 0xFFFF
        cell = group * BUCKETS + bucket
        for table, number in zip(
            self._tables, (whole, high * high, high * low, low * low), strict=True
        ):
            np.add.at(table, cell, number)
        np.add.at(self.count, group, 1)

    def total(self, group: int = 0) -> float:
        """Return the sum of a group, rounded once."""
        return self._sums(group)[0] / (1 << FRACTION_BITS)

    def mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation (population, ddof 0) of each group, float64 [G].

        Both are 0 for a group without values.
        """
        mean, deviation = np.zeros(len(self.count)), np.zeros(len(self.count))
        for group in np.flatnonzero(self.count).tolist():
            n, (first, second) = int(self.count[group]), self._sums(group)
            mean[group] = first / (n << FRACTION_BITS)
            deviation[group] = math.sqrt(
                (n * second - first * first) / (n * n << 2 * FRACTION_BITS)
            )
        return mean, deviation

    def _sums(self, group: int) -> tuple[int, int]:
        """Return the sum times 2^FRACTION_BITS and the sum of squares times 2^(2 FRACTION_BITS)."""
        first = second = 0
        for bucket in range(BUCKETS):
            whole, high, mixed, low = (
                int(table[group * BUCKETS + bucket]) for table in self._tables
            )
            first += whole << BUCKET_BITS * bucket
            second += ((high << 32) + (mixed << 17) + low) << 2 * BUCKET_BITS * bucket
        return first, second
