"""Weights for training on a keep-list as if on the whole dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.selection.base import SelectionPlan
from raypipe.selection.radix_select import Boundary, Chunk, Chunks, class_groups
from raypipe.selection.statistics import ExactMoments


@dataclass(frozen=True, eq=False)
class InverseInclusionWeights:
    """1 / (probability of being drawn), scaled to mean 1 over the list.

    Horvitz & Thompson 1952.
    """

    plan: SelectionPlan
    boundary: Boundary
    scale: float = 1.0

    def of(self, chunk: Chunk, rows: np.ndarray) -> np.ndarray:
        """Return the weights of some samples of a chunk, float32 [rows]."""
        assert self.plan.inclusion is not None
        share = self.plan.inclusion(chunk, self.boundary)[rows]
        return (self.scale / share).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ClassWeights:
    """(share of the class in the dataset) / (its share in the list): post-stratification.

    Holt & Smith 1979. With these weights the class frequencies of the list are those of the
    dataset; the unlabelled count as a class. A class with no sample in the list has nothing to
    weight: the mean weight, otherwise 1, is lower by its share.

    Attributes
    ----------
    weight : np.ndarray
        float32 [classes + 1]; the last one is for the unlabelled.
    """

    weight: np.ndarray

    def of(self, chunk: Chunk, rows: np.ndarray) -> np.ndarray:
        """Return the weights of some samples of a chunk, float32 [rows]."""
        return self.weight[class_groups(chunk.label, len(self.weight) - 1)[rows]]


Weights = InverseInclusionWeights | ClassWeights


def inverse_inclusion_weights(
    chunks: Chunks, plans: Sequence[SelectionPlan], boundaries: Sequence[Boundary]
) -> list[Weights]:
    """Return the weights of each list; one pass over the stream computes their means."""
    raw = [
        InverseInclusionWeights(plan, boundary)
        for plan, boundary in zip(plans, boundaries, strict=True)
    ]
    sums = [ExactMoments() for _ in raw]
    for chunk in chunks(True):
        for weights, boundary, total in zip(raw, boundaries, sums, strict=True):
            total.add(weights.of(chunk, np.flatnonzero(boundary.mask(chunk))))
    return [
        InverseInclusionWeights(
            plan, boundary, boundary.count / total.total() if boundary.count else 1.0
        )
        for plan, boundary, total in zip(plans, boundaries, sums, strict=True)
    ]


def class_weights(chunks: Chunks, boundaries: Sequence[Boundary], classes: int) -> list[Weights]:
    """Return the weights of each list; one pass counts classes in the stream and in the lists."""
    population, listed = (
        np.zeros(classes + 1, np.int64),
        np.zeros((len(boundaries), classes + 1), np.int64),
    )
    for chunk in chunks(any(boundary.needs_ids for boundary in boundaries)):
        group = class_groups(chunk.label, classes)
        population += np.bincount(group, minlength=classes + 1)
        for counts, boundary in zip(listed, boundaries, strict=True):
            counts += np.bincount(group[boundary.mask(chunk)], minlength=classes + 1)
    total = int(population.sum())
    return [
        ClassWeights(
            (population * boundary.count / np.maximum(counts * total, 1)).astype(np.float32)
        )
        for counts, boundary in zip(listed, boundaries, strict=True)
    ]
