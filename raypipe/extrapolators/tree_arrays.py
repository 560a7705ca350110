"""Boosted trees as arrays: predicted without scikit-learn, stored without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

CHUNK_VALUES = 1 << 16
"""Maximum number of (sample, tree) positions held at once while predicting (512 KiB: more would
leave the cache)."""


@dataclass(frozen=True)
class Forest:
    """A sum of regression trees.

    The nodes of all trees stand in one list. A tree is identified by its first node.

    Attributes
    ----------
    root
        First node of each tree, int32 [trees].
    feature
        Feature that a node tests, int32 [nodes].
    threshold
        A value up to and including this takes the left branch, float64 [nodes].
    missing
        Whether NaN takes the left branch, bool [nodes].
    left, right
        Next nodes, int32 [nodes]; a leaf points to itself.
    value
        What a leaf adds to the prediction, float64 [nodes].
    start
        What the leaves are added to, float64 [1].
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
        """Convert the first `count` trees of a fitted `HistGradientBoostingRegressor`.

        It must use squared error and no categorical features. scikit-learn has no public name for
        its trees; a test compares the predictions with scikit-learn's own.
        """
        trees = [stage[0].nodes for stage in model._predictors[:count]]
        sizes = [len(nodes) for nodes in trees]
        root, nodes = np.cumsum([0, *sizes[:-1]]), np.concatenate(trees)
        own, offset = np.arange(len(nodes)), np.repeat(root, sizes)
        leaf = nodes["is_leaf"].astype(bool)
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
        """Return predictions, float64 [n], from features, float [n, f]."""
        x, result = np.ascontiguousarray(x, np.float64), np.full(len(x), self.start[0])
        feature, children, depth = self._traversal
        has_missing = np.isnan(x).any()
        step = max(1, CHUNK_VALUES // max(1, len(self.root)))
        for first in range(0, len(x), step):
            part = x[first : first + step]
            row = (np.arange(len(part)) * part.shape[1])[:, None]
            node = np.broadcast_to(self.root.astype(np.intp), (len(part), len(self.root)))
            for _ in range(depth):
                tested = part.take(feature.take(node) + row)
                right = tested > self.threshold.take(node)
                if has_missing:
                    right |= np.isnan(tested) & ~self.missing.take(node)
                node = children.take(2 * node + right)
            result[first : first + step] += self.value.take(node).sum(1)
        return result

    @cached_property
    def _traversal(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Feature of each node, its children (left then right), and the depth of the trees."""
        children = np.stack([self.left, self.right], 1).astype(np.intp)
        depth, node = 0, np.unique(self.root)
        while len(node := node[children[node, 0] != node]):
            depth, node = depth + 1, np.unique(children[node])
        return self.feature.astype(np.intp), children.ravel(), depth

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], prefix: str, width: int) -> Forest:
        """Restore a forest from its `tensors`.

        Parameters
        ----------
        tensors
            Arrays whose names begin with `prefix`.
        prefix
            Prefix of the names.
        width
            Number of features.

        Raises
        ------
        KeyError
            An array is missing.
        ValueError
            The nodes do not form a forest over `width` features.
        """
        forest = cls(
            **{field.name: np.array(tensors[prefix + field.name]) for field in fields(cls)}
        )
        count, own = len(forest.feature), np.arange(len(forest.feature))
        per_node = (forest.threshold, forest.missing, forest.left, forest.right, forest.value)
        if any(array.shape != (count,) for array in per_node) or forest.start.shape != (1,):
            raise ValueError("the arrays of the trees differ in length")
        leaf = (forest.left == own) & (forest.right == own)
        # children follow their parent, so that every path ends
        inner = (
            (forest.left > own)
            & (forest.right > own)
            & (forest.left < count)
            & (forest.right < count)
        )
        valid_feature = (forest.feature >= 0) & (forest.feature < width)
        valid_root = (forest.root >= 0) & (forest.root < count)
        if not ((leaf | inner) & valid_feature).all() or not valid_root.all():
            raise ValueError("the nodes of the trees lead nowhere")
        return forest
