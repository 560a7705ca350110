"""kNN extrapolation as published.

Source: arXiv 2506.09010, "Effective Data Pruning through Score Extrapolation", its kNN variant.

    score(x) = sum_{i in NN_k(x)} w_i s_i / sum_{i in NN_k(x)} w_i ,   w_i = exp(-||z_x - z_i||_2)

Neighbours are searched among the scored samples only, k = 20. Labels are not used. The weights are
computed as a softmax over the negative distances. The quotient is the same, but never 0 / 0 when
all distances are large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.progress import ProgressCallback


class KnnPublished(Extrapolator):
    """The mean of the k nearest scored samples, weighted by exp(-distance)."""

    name = "knn-published"
    default_neighbours = 20

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Index the seed set.

        Raises
        ------
        RaypipeError
            There are no samples, or scores or embeddings are not finite.
        """
        self._score = self._check_fit(seed, score)
        self._build_index(seed.embedding)
        if progress is not None:
            progress(1, 1)

    def predict(self, nodes: Nodes) -> np.ndarray:
        return self.predict_with_difficulty(nodes)[0]

    def predict_with_difficulty(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        self._check_nodes(nodes)
        distance, row = self._nearest(nodes)
        # the nearest neighbour comes first and gets the weight 1
        weight = np.exp(-(distance - distance[:, :1]).astype(np.float64))
        mean = (weight * self._score[row]).sum(1) / weight.sum(1)
        return mean.astype(np.float32), self._remoteness(distance)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        return {**tensors, "score": self._score}, meta

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta)
        if len(tensors.get("score", ())) != len(self._scored):
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged: "
                "scores do not match the index; fit it again"
            )
        self._score = np.asarray(tensors["score"], dtype=np.float64)
