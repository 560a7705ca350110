"""Boosted trees as arrays: what scikit-learn fitted, predicted without it and stored without a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

CHUNK_VALUES = 1 << 16
"""Most places in trees held at once while predicting (512 KiB: more would leave the cache)."""


@dataclass(frozen=True)
class Forest:
    """A sum of regression trees. All nodes of all trees stand in one list; a tree is named by its first.

    root        int32 [trees], the first node of each tree
    feature     int32 [nodes], the feature a node asks for
    threshold   float64 [nodes]: up to and including it the left branch is taken
    missing     bool [nodes], whether a feature that is not a number takes the left branch
    left, right int32 [nodes], the next nodes; a leaf names itself
    value       float64 [nodes], what a leaf adds
    start       float64 [1], what the leaves are added to
    """

    root: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    missing: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, model: Any, count: int) -> Forest:
        """The first trees of a fitted `sklearn.ensemble.HistGradientBoostingRegressor` with squared error and no categories.

        scikit-learn has no public name for them; a test compares predictions with its own.
        """
        trees = [stage[0].nodes for stage in model._predictors[:count]]
        sizes = [len(nodes) for nodes in trees]
        root, nodes = np.cumsum([0, *sizes[:-1]]), np.concatenate(trees)
        own, offset, leaf = (
            np.arange(len(nodes)),
            np.repeat(root, sizes),
            nodes["is_leaf"].astype(bool),
        )
        return cls(
            root.astype(np.int32),
            np.where(leaf, 0, nodes["feature_idx"]).astype(np.int32),
            np.where(leaf, 0, nodes["num_threshold"]).astype(np.float64),
            nodes["missing_go_to_left"].astype(bool),
            np.where(leaf, own, nodes["left"] + offset).astype(np.int32),
            np.where(leaf, own, nodes["right"] + offset).astype(np.int32),
            np.where(leaf, nodes["value"], 0).astype(np.float64),
            np.asarray(model._baseline_prediction, np.float64).reshape(1),
        )

    def predict(self, x: np.ndarray) -> np.ndarray:
        """float64 [n] from features float [n, f]."""
        x, result = np.ascontiguousarray(x, np.float64), np.full(len(x), self.start[0])
        feature, after, levels = self._walk
        numbers_only = not np.isnan(x).any()
        step = max(1, CHUNK_VALUES // max(1, len(self.root)))
        for first in range(0, len(x), step):
            part = x[first : first + step]
            row = (np.arange(len(part)) * part.shape[1])[:, None]
            node = np.broadcast_to(self.root.astype(np.intp), (len(part), len(self.root)))
            for _ in range(levels):
                asked = part.take(feature.take(node) + row)
                right = asked > self.threshold.take(node)
                if not numbers_only:
                    right |= np.isnan(asked) & ~self.missing.take(node)
                node = after.take(2 * node + right)
            result[first : first + step] += self.value.take(node).sum(1)
        return result

    @cached_property
    def _walk(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The feature each node asks for; where it leads, left then right; how many questions the longest way has."""
        after = np.stack([self.left, self.right], 1).astype(np.intp)
        levels, node = 0, np.unique(self.root)
        while len(node := node[after[node, 0] != node]):
            levels, node = levels + 1, np.unique(after[node])
        return self.feature.astype(np.intp), after.ravel(), levels

    def tensors(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], prefix: str, width: int) -> Forest:
        """Restore what `tensors` gave, here with names that begin with `prefix`, for features float [n, width].

        Raises KeyError for a missing array and ValueError for nodes that are not a forest over so many features.
        """
        forest = cls(
            **{field.name: np.array(tensors[prefix + field.name]) for field in fields(cls)}
        )
        count, own = len(forest.feature), np.arange(len(forest.feature))
        each = (forest.threshold, forest.missing, forest.left, forest.right, forest.value)
        if any(part.shape != (count,) for part in each) or forest.start.shape != (1,):
            raise ValueError("the arrays of the trees differ in length")
        leaf = (forest.left == own) & (forest.right == own)
        onward = (
            (forest.left > own)
            & (forest.right > own)
            & (forest.left < count)
            & (forest.right < count)
        )
        known = (forest.feature >= 0) & (forest.feature < width)
        if (
            not ((leaf | onward) & known).all()
            or not ((forest.root >= 0) & (forest.root < count)).all()
        ):
            raise ValueError("the nodes of the trees lead nowhere")
        return forest
