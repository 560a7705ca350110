"""A subset of a dataset whose samples come with their training weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset, Subset


class WeightedSubset(Subset[Any]):
    """Some samples of a map-style dataset, each with its weight.

    A sample that is a tuple gets the weight as one more element, a dict as `weight`. Any other
    sample becomes the pair (sample, weight).

    Attributes
    ----------
    weights : sequence of float
        In the order of `indices`.
    """

    def __init__(
        self, dataset: Dataset[Any], indices: Sequence[int], weights: Sequence[float]
    ) -> None:
        super().__init__(dataset, indices)
        self.weights = weights

    def __getitem__(self, index: Any) -> Any:
        sample, weight = self.dataset[self.indices[index]], self.weights[index]
        if isinstance(sample, dict):
            return {**sample, "weight": weight}
        return (*sample, weight) if isinstance(sample, tuple) else (sample, weight)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]
