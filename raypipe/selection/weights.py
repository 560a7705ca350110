"""Weights for training on a keep-list as if on the whole dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.selection.base import SelectionPlan
from raypipe.selection.radix_select import Boundary, Chunk, Chunks, class_groups
from raypipe.selection.statistics import ExactMoments


@dataclass(frozen=True, eq=False)
class InverseInclusion:
    """1 / (probability with which the sample is drawn), scaled to a mean of 1 over the list (Horvitz & Thompson 1952)."""

    plan: SelectionPlan
    boundary: Boundary
    scale: float = 1.0

    def of(self, chunk: Chunk, rows: np.ndarray) -> np.ndarray:
        """float32 [rows]."""
        assert self.plan.inclusion is not None
        share = self.plan.inclusion(chunk, self.boundary)[rows]
        return (self.scale / share).astype(np.float32)


@dataclass(frozen=True, eq=False)
class OfClass:
    """(share of the class in the whole dataset) / (its share in the list): post-stratification (Holt & Smith 1979).

    Weighted class frequencies of the list are then those of the dataset, the unlabelled being a class. A class of which the list
    has no sample has none to weigh: the mean weight, else 1, is lower by its share.
    """

    weight: np.ndarray

    def of(self, chunk: Chunk, rows: np.ndarray) -> np.ndarray:
        """float32 [rows]."""
        return self.weight[class_groups(chunk.label, len(self.weight) - 1)[rows]]


Weights = InverseInclusion | OfClass


def inverse_inclusion(
    chunks: Chunks, plans: Sequence[SelectionPlan], ends: Sequence[Boundary]
) -> list[Weights]:
    """Weights of each list, by one pass over the stream for their means."""
    raw = [InverseInclusion(plan, end) for plan, end in zip(plans, ends, strict=True)]
    sums = [ExactMoments() for _ in raw]
    for chunk in chunks(True):
        for weights, end, total in zip(raw, ends, sums, strict=True):
            total.add(weights.of(chunk, np.flatnonzero(end.mask(chunk))))
    return [
        InverseInclusion(plan, end, end.count / total.total() if end.count else 1.0)
        for plan, end, total in zip(plans, ends, sums, strict=True)
    ]


def of_classes(chunks: Chunks, ends: Sequence[Boundary], classes: int) -> list[Weights]:
    """Weights of each list, by one pass over the stream that counts classes in it and in the lists."""
    everything, kept = np.zeros(classes + 1, np.int64), np.zeros((len(ends), classes + 1), np.int64)
    for chunk in chunks(any(end.needs_ids for end in ends)):
        group = class_groups(chunk.label, classes)
        everything += np.bincount(group, minlength=classes + 1)
        for counts, end in zip(kept, ends, strict=True):
            counts += np.bincount(group[end.mask(chunk)], minlength=classes + 1)
    total = int(everything.sum())
    return [
        OfClass((everything * end.count / np.maximum(counts * total, 1)).astype(np.float32))
        for counts, end in zip(kept, ends, strict=True)
    ]
