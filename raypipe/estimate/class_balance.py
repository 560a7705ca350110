"""The balance of the classes, counted or estimated from the labels of some files."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from raypipe.estimate.facts import ClassBalance
from raypipe.estimate.listing import LabelCounts
from raypipe.sources import ClassMap

MIN_LABELS_PER_CLASS = 20
"""Labels per class from which the sizes of small classes are estimated."""


def class_balance(
    classes: ClassMap, by_file: Sequence[LabelCounts], total: int, exact: bool
) -> ClassBalance | None:
    """Return the balance of the classes; None without labels.

    Parameters
    ----------
    classes
        The classes of the source.
    by_file
        Labels of each file of which some are known.
    total
        Samples of the source.
    exact
        Whether every label of the source is among them.
    """
    labels: LabelCounts = sum(by_file, Counter())
    counted = labels.total()
    if not counted or not classes.names:
        return None
    sizes = dict.fromkeys(classes.names, 0)
    for label, count in labels.items():
        index, _ = classes.index(label)
        if index >= 0:
            sizes[classes.names[index]] += count
    scale = 1.0 if exact else total / counted
    scaled = {
        name: round(count * scale)
        for name, count in sorted(sizes.items(), key=lambda item: -item[1])
    }
    enough = exact or counted >= MIN_LABELS_PER_CLASS * len(sizes)
    small = sum(count < 10 for count in scaled.values()) if enough else None
    balance = ClassBalance(exact, counted, scaled, labels[None] / counted, small)
    if exact or len(by_file) < 2:
        return balance
    margins = _margins(classes, by_file, len(scaled))
    largest = next(iter(scaled))
    mean = statistics.fmean(scaled.values()) / total
    even = all(abs(count / total - mean) <= margins[name] for name, count in scaled.items())
    return replace(balance, margin=round(margins[largest] * total), even=even)


def _margins(classes: ClassMap, by_file: Sequence[LabelCounts], count: int) -> dict[str, float]:
    """Return half the width of the interval of each class's share, 95 % for all together.

    Samples of one file resemble one another, for example where files are sorted by class. The
    variance is therefore that between files (ratio estimator for clusters; Cochran, *Sampling
    Techniques*, 1977, equation 6.13), and at least that of independent draws.
    """
    files, sizes = len(by_file), [labels.total() for labels in by_file]
    total = sum(sizes)
    width = statistics.NormalDist().inv_cdf(1 - 0.025 / count)
    margins = {}
    for index, name in enumerate(classes.names):
        in_file = [
            sum(number for label, number in labels.items() if classes.index(label)[0] == index)
            for labels in by_file
        ]
        share = sum(in_file) / total
        spread = sum((inside - share * size) ** 2 for inside, size in zip(in_file, sizes))
        clustered = files / (files - 1) * spread / total**2
        margins[name] = width * math.sqrt(max(clustered, share * (1 - share) / total))
    return margins
