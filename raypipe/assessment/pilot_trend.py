"""From small trainings on lists of a seed set to lists of the whole source.

A list of everything gains nothing over a random one. So the gain over random lists is modelled as

    gain = (1 - keep) (a + b log2(samples kept of each class))

over all keep fractions and sizes that were tried. What is best changes with this number: few
samples need the easy ones, many the hard ones (Sorscher et al. 2022, "Beyond neural scaling laws",
arXiv 2206.14486). The line is read off at the size of the source, beyond everything that was tried;
its interval widens with the distance. The form is an assumption. Where the cells deviate from it,
the interval widens as well (`raypipe.assessment.gains`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.assessment.accuracy_curve import AccuracyCurve, fit_accuracy
from raypipe.assessment.gains import Gain, GainModel, fit_gains

MIN_CELLS, MIN_REPEATS = 3, 3
"""Least cells and repeats that a line is fitted to."""


@dataclass(frozen=True, eq=False)
class PilotTrend:
    """The fitted lines.

    Attributes
    ----------
    models
        By name of the candidate.
    random, position
        Results of random lists, and log2 of the samples of each class that they keep.
    """

    models: Mapping[str, GainModel]
    random: np.ndarray
    position: np.ndarray

    @functools.cached_property
    def curve(self) -> AccuracyCurve:
        """Accuracy of random lists by their size."""
        return fit_accuracy(self.random, self.position)

    @classmethod
    def fit(
        cls,
        random: np.ndarray,
        lists: Mapping[str, np.ndarray],
        keep: np.ndarray,
        per_class: np.ndarray,
    ) -> PilotTrend:
        """Fit the lines.

        Parameters
        ----------
        random
            Right or wrong (1 or 0) of models on random lists, [cells, repeats, test samples].
        lists
            The same of models on the lists of each candidate. All have the weights, the order and
            the size of the random list of the same cell and repeat.
        keep, per_class
            Keep fraction of each cell, and samples of each class that its lists keep, float64
            [cells].
        """
        position = np.log2(per_class)
        design = np.stack(_row(keep, position), 1)
        difference = np.stack([correct.astype(np.int8) - random for correct in lists.values()])
        models = fit_gains(difference, design)
        return cls(dict(zip(lists, models, strict=True)), random, position)

    def gains(self, keep: float, per_class: float) -> dict[str, Gain]:
        """Return the gains of lists of a fraction that keep `per_class` samples of each class."""
        row = _row(keep, np.log2(per_class))
        return {name: model.at(*row) for name, model in self.models.items()}

    def loss_of_pruning(self, per_class: float, all_per_class: float) -> tuple[float, float, float]:
        """Return what random lists lose to everything, negative, with its 95 % interval.

        Parameters
        ----------
        per_class, all_per_class
            Samples of each class in the list and in the source.
        """
        return self.curve.gap(float(np.log2(per_class)), float(np.log2(all_per_class)))


def _row(keep: Any, position: Any) -> tuple[Any, Any]:
    """Return the row of the design for a keep fraction at log2(samples kept of each class)."""
    return 1 - keep, (1 - keep) * position
