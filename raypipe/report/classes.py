"""The highest and lowest samples of some classes, from a bounded number of score shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raypipe import storage
from raypipe.report.score_scan import CLASS_FRAGMENTS, Highest, Pick, ScoreScan, picker
from raypipe.runs.layout import Run


@dataclass
class ClassPicks:
    """By class the samples of the lowest and of the highest scores, the most extreme first, in so many of all the fragments."""

    lowest: dict[int, list[Pick]] = field(default_factory=dict)
    highest: dict[int, list[Pick]] = field(default_factory=dict)
    fragments_read: int = 0
    fragments_there: int = 0


def pick_of_classes(run: Run, scan: ScoreScan, labels: Sequence[int], images: int) -> ClassPicks:
    """At most `images` samples of each end of each class, in CLASS_FRAGMENTS fragments that have these classes.

    labels  classes, the number of classes for the unlabelled
    """
    if not labels or not images:
        return ClassPicks()
    chosen = scan.class_fragments.of(labels, CLASS_FRAGMENTS)
    ends = {(label, sign): Highest(images) for label in labels for sign in (-1, 1)}
    columns = ["sample_id", "score", "label", "lower", "upper", "measured"]
    tables = storage.ahead(
        lambda name: storage.read_table(run.path("scores", f"{name}.parquet"), columns),
        chosen,
        run.uri,
    )
    for fragment, table in tables:
        score = table["score"].to_numpy().astype(np.float64)
        label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
        lower, upper = (table[name].to_numpy().astype(np.float64) for name in ("lower", "upper"))
        pick = picker(fragment, table, score, label, [lower, upper])
        score = np.where(np.isfinite(score), score, np.nan)
        row_class = np.where((label < 0) | (label >= scan.classes), scan.classes, label)
        for (of, sign), best in ends.items():
            best.offer(np.where(row_class == of, sign * score, np.nan), pick)
    return ClassPicks(
        {label: ends[label, -1].picks() for label in labels},
        {label: ends[label, 1].picks() for label in labels},
        len(chosen),
        len(run.done("scores")),
    )
