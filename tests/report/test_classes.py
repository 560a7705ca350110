"""Single classes in the report: histograms, medians, images at both ends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from raypipe import storage
from raypipe.report import classes
from raypipe.report.classes import pick_class_samples
from raypipe.report.score_scan import (
    SMALL_BINS,
    ClassFragments,
    both_ends,
    scan_scores,
    shown_classes,
)
from raypipe.runs.run import Run

MakeRun = Callable[..., Run]


def rows_of(run: Run) -> list[dict]:
    return pa.concat_tables(
        [table for _, table in storage.iter_tables(run.path("scores"))]
    ).to_pylist()


def test_histograms_of_the_classes_add_up_to_that_of_all(make_run: MakeRun) -> None:
    run = make_run()
    scan, rows = scan_scores(run, 3, 0), rows_of(run)
    edges = scan.histogram["edges"]
    for kind, wanted in (("measured", True), ("extrapolated", False)):
        found = np.array(
            [scan.class_histogram(label)[kind == "extrapolated"] for label in range(4)]
        )
        assert found.shape == (4, SMALL_BINS)
        assert (
            found.sum(0).tolist()
            == np.reshape(scan.histogram[kind], (SMALL_BINS, -1)).sum(1).tolist()
        )
        for label in (0, 1, 2, None):
            scores = [
                row["score"] for row in rows if row["label"] == label and row["measured"] is wanted
            ]
            direct = np.histogram(
                np.clip(scores, edges[0], edges[-1]),
                np.linspace(edges[0], edges[-1], SMALL_BINS + 1),
            )[0]
            assert np.abs(found[3 if label is None else label] - direct).sum() <= 2, (
                "up to rounding at an edge"
            )


def test_classes_come_in_the_order_of_their_medians(make_run: MakeRun) -> None:
    run = make_run(names=[f"c{number}" for number in range(8)])
    scan, rows = scan_scores(run, 8, 0), rows_of(run)
    medians = [
        np.median([row["score"] for row in rows if row["label"] == label])
        for label in scan.by_median()
        if label < 8
    ]
    assert medians == pytest.approx(sorted(medians), abs=0.1)
    assert shown_classes(scan, 20) == scan.by_median()
    assert shown_classes(scan, 4) == [*scan.by_median()[:2], *scan.by_median()[-2:]]
    assert both_ends(list("abcde"), 3) == ["a", "b", "e"] and both_ends(list("abc"), 0) == []


def test_classes_of_few_samples_are_no_extremes_where_others_are_enough(make_run: MakeRun) -> None:
    scan = scan_scores(make_run(names=[f"c{number}" for number in range(6)]), 6, 0)
    lowest = scan.by_median()[0]
    scan.class_samples[lowest] = 3
    assert lowest not in shown_classes(scan, 4)
    assert lowest in shown_classes(scan, 7), "all are shown"


def test_the_ends_of_each_class_are_those_of_a_sort(make_run: MakeRun) -> None:
    run = make_run()
    found = pick_class_samples(run, scan_scores(run, 3, 0), [2, 0, 3], 4)
    assert (found.fragments_read, found.fragments) == (4, 4)
    assert list(found.lowest) == [2, 0, 3]
    for label in (2, 0, 3):
        rows = sorted(
            (row for row in rows_of(run) if row["label"] == (None if label == 3 else label)),
            key=lambda row: row["score"],
        )
        assert [pick.sample_id for pick in found.lowest[label]] == [
            row["sample_id"] for row in rows[:4]
        ]
        assert [pick.sample_id for pick in found.highest[label]] == [
            row["sample_id"] for row in rows[:-5:-1]
        ]
    assert pick_class_samples(run, scan_scores(run, 3, 0), [0], 0).lowest == {}


def test_of_a_sorted_source_the_fragments_of_the_class_are_read(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of images: each class has its own fragments, so a few random ones would miss most."""
    run = make_run(names=[f"c{number}" for number in range(12)], fragments=24)
    for number, (file, table) in enumerate(storage.iter_tables(run.path("scores"))):
        label = pa.array(np.full(len(table), number // 2, np.int32))
        storage.write_table(run.path("scores", file), table.set_column(1, "label", label))
    monkeypatch.setattr(classes, "CLASS_FRAGMENTS", 3)
    found = pick_class_samples(run, scan_scores(run, 12, 0), [4, 9, 11], 5)
    assert (found.fragments_read, found.fragments) == (3, 24)
    assert all(len(found.lowest[label]) == len(found.highest[label]) == 5 for label in (4, 9, 11))
    assert {pick.label for pick in found.highest[9]} == {9}


def test_classes_of_a_shuffled_source_share_their_fragments() -> None:
    found, many = ClassFragments(50), [f"f{number:04d}" for number in range(400)]
    for name in many:
        found.add(name, np.arange(50))
    chosen = found.containing(range(0, 50, 7), 32)
    assert len(chosen) == 32 and set(chosen) <= set(many)
    assert chosen == found.containing([3], 32), "the same of every class"
    again = ClassFragments(50)
    for name in reversed(many):
        again.add(name, np.arange(50))
    assert again.containing([3], 32) == chosen, "whatever order they come in"
    assert ClassFragments(2).containing([0, 1], 5) == []
