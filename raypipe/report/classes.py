"""Samples with the highest and lowest scores of some classes, from a few shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raypipe import storage
from raypipe.report.score_scan import (
    CLASS_FRAGMENTS,
    HighestPicks,
    Pick,
    ScoreScan,
    pick_maker,
)
from raypipe.runs.run import Run


@dataclass
class ClassPicks:
    """Samples with the lowest and the highest scores of each class, the most extreme first.

    They come from `fragments_read` of all `fragments` that have scores.
    """

    lowest: dict[int, list[Pick]] = field(default_factory=dict)
    highest: dict[int, list[Pick]] = field(default_factory=dict)
    fragments_read: int = 0
    fragments: int = 0


def pick_class_samples(run: Run, scan: ScoreScan, labels: Sequence[int], images: int) -> ClassPicks:
    """Return at most `images` samples from each end of each class.

    Parameters
    ----------
    run
        The run whose scores are read.
    scan
        Tells which fragments have which classes; CLASS_FRAGMENTS of them are read.
    labels
        Classes; the number of classes stands for the unlabelled.
    images
        Samples at each end.
    """
    if not labels or not images:
        return ClassPicks()
    fragments = scan.class_fragments.containing(labels, CLASS_FRAGMENTS)
    lowest = {label: HighestPicks(images) for label in labels}
    highest = {label: HighestPicks(images) for label in labels}
    columns = ["sample_id", "score", "label", "lower", "upper", "measured"]
    tables = storage.ahead(
        lambda name: storage.read_table(run.score_shard(name), columns), fragments, run.uri
    )
    for fragment, table in tables:
        score = table["score"].to_numpy().astype(np.float64)
        label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
        pick = pick_maker(fragment, table, score, label)
        score = np.where(np.isfinite(score), score, np.nan)
        row_class = scan.class_row(label)
        for target in labels:
            own = np.where(row_class == target, score, np.nan)
            lowest[target].offer(-own, pick)
            highest[target].offer(own, pick)
    return ClassPicks(
        {label: best.picks() for label, best in lowest.items()},
        {label: best.picks() for label, best in highest.items()},
        len(fragments),
        len(run.done("scores")),
    )
