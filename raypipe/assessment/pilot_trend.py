"""From small trainings on lists of a seed set to lists of the whole source.

The gain over random lists is a straight line in log2 of the samples that a list keeps of each
class, over all keep fractions and sizes that were tried. What is best changes with this number: few
samples need the easy ones, many the hard ones (Sorscher et al. 2022, "Beyond neural scaling laws",
arXiv 2206.14486). The line is read off at the size of the source, beyond everything that was tried;
its interval widens with the distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    curve
        Accuracy of random lists.
    """

    models: Mapping[str, GainModel]
    curve: AccuracyCurve

    @classmethod
    def fit(
        cls, random: np.ndarray, lists: Mapping[str, np.ndarray], per_class: np.ndarray
    ) -> PilotTrend:
        """Fit the lines.

        Parameters
        ----------
        random
            Right or wrong (1 or 0) of models on random lists, [cells, repeats, test samples].
        lists
            The same of models on the lists of each candidate. All have the weights, the order and
            the size of the random list of the same cell and repeat.
        per_class
            Samples of each class that the lists of a cell keep, float64 [cells].
        """
        position = np.log2(per_class)
        design = np.stack([np.ones_like(position), position], 1)
        difference = np.stack([correct.astype(np.int8) - random for correct in lists.values()])
        models = fit_gains(difference, design)
        return cls(dict(zip(lists, models, strict=True)), fit_accuracy(random, position))

    def gains(self, per_class: float) -> dict[str, Gain]:
        """Return the gains of lists that keep this number of samples of each class."""
        position = float(np.log2(per_class))
        return {name: model.at(1.0, position) for name, model in self.models.items()}

    def loss_of_pruning(self, per_class: float, all_per_class: float) -> tuple[float, float, float]:
        """Return what random lists lose to everything, negative, with its 95 % interval.

        Parameters
        ----------
        per_class, all_per_class
            Samples of each class in the list and in the source.
        """
        return self.curve.gap(float(np.log2(per_class)), float(np.log2(all_per_class)))
