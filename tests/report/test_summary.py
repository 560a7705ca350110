from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raypipe import storage
from raypipe.errors import RunError
from raypipe.report import summarize
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run

MakeRun = Callable[..., Run]
KEYS = {
    "format", "raypipe", "made", "run", "unfinished", "refused", "source", "counts", "fidelity",
    "code", "high_is_hard", "fidelity_seed", "learning_curve", "neighbour_search", "label_noise",
    "scores", "keep",
    "classes", "shown_classes", "even_classes", "class_histograms", "class_grids",
    "class_fragments", "headline", "sets", "stability",
    "cost", "pilot", "evaluation", "embeddings", "grids", "rejects", "settings",
}  # fmt: skip


def all_scores(run: Run) -> pa.Table:
    return pa.concat_tables([table for _, table in storage.iter_tables(run.path("scores"))])


def test_the_figures_are_those_of_the_files(make_run: MakeRun) -> None:
    run = make_run()
    summary, table = summarize(run), all_scores(run)
    measured = table["measured"].to_numpy()
    assert set(summary) == KEYS
    json.dumps(summary, allow_nan=False)
    assert summary["counts"] == {
        "indexed": 200, "samples": 199,
        "measured": int(measured.sum()), "extrapolated": int((~measured).sum()),
        "unlabelled": table["label"].null_count, "not_finite": 0,
        "rejects": 1, "unreadable_files": 1, "accounted": True,
    }  # fmt: skip
    assert summary["unfinished"] == []
    assert summary["scores"]["mean"] == pytest.approx(table["score"].to_numpy().mean(), rel=1e-5)
    assert sum(summary["scores"]["histogram"]["measured"]) == measured.sum()
    assert sum(summary["scores"]["histogram"]["extrapolated"]) == (~measured).sum()
    assert summary["rejects"]["reasons"] == [
        {"reason": "empty: 0 bytes", "samples": 1, "example": "part-0#0"}
    ]
    assert summary["rejects"]["unreadable_files"] == [
        {"path": "cut.parquet", "reason": "no footer"}
    ]


@pytest.mark.parametrize("most", [0, 1000])
def test_scores_that_did_not_stay_in_memory_give_the_same_figures(
    most: int, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reads = make_run(), list[str]()
    read_table = storage.read_table

    def counted(uri: str, columns: list[str] | None = None) -> pa.Table:
        reads.append(uri)
        return read_table(uri, columns)

    for module in (storage, storage.content):
        monkeypatch.setattr(module, "read_table", counted)
    expected, first = summarize(run), len(reads)
    monkeypatch.setattr("raypipe.report.score_scan.CACHE_BYTES", most)
    assert {**summarize(run), "made": ""} == {**expected, "made": ""}
    assert len(reads) - first == first + len(run.done("scores"))


def test_classes_before_and_after_each_keep_list(make_run: MakeRun) -> None:
    run = make_run(select={"keep": [0.5, 0.1]})
    summary = summarize(run)
    assert [(item["fraction"], item["samples"], item["strategy"]) for item in summary["keep"]] == [
        (0.1, 20, "top"),
        (0.5, 100, "top"),
    ]
    assert [item["name"] for item in summary["classes"]] == ["cat", "dog", "owl", "unlabelled"]
    assert sum(item["samples"] for item in summary["classes"]) == 199
    for item in summary["keep"]:
        kept = [row["kept"][item["file"]] / row["samples"] for row in summary["classes"]]
        assert sum(row["kept"][item["file"]] for row in summary["classes"]) == item["samples"]
        assert item["least_kept"]["share"] == min(kept)
        assert item["most_kept"]["share"] == max(kept)
        assert item["emptied_classes"] == kept.count(0)
    in_class = [row["score"] for row in all_scores(run).to_pylist() if row["label"] == 2]
    owl = next(item for item in summary["shown_classes"] if item["name"] == "owl")
    for key, quantile in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
        assert owl[key] == pytest.approx(np.quantile(in_class, quantile), abs=0.25)


def test_grids_hold_the_samples_at_the_ends(make_run: MakeRun) -> None:
    run = make_run(report={"images": 5})
    grids, rows = summarize(run)["grids"], all_scores(run).to_pylist()
    by_score = sorted(rows, key=lambda row: row["score"])
    assert [tile["sample_id"] for tile in grids["lowest"]] == [
        row["sample_id"] for row in by_score[:5]
    ]
    assert [tile["sample_id"] for tile in grids["highest"]] == [
        row["sample_id"] for row in by_score[: -5 - 1 : -1]
    ]
    widest = sorted(rows, key=lambda row: row["lower"] - row["upper"])
    assert [tile["sample_id"] for tile in grids["uncertain"]] == [
        row["sample_id"] for row in widest[:5]
    ]
    assert grids["suspects"]
    assert all(
        tile["label"] != tile["prediction"] and tile["margin"] < 0 for tile in grids["suspects"]
    )
    margins = [tile["margin"] for tile in grids["suspects"]]
    assert margins == sorted(margins)


def test_the_saving_is_worked_out_from_the_ledger(make_run: MakeRun) -> None:
    run = make_run()
    records = run.ledger()
    records["proxy"].gpu_seconds = 7.0
    # 10 audit samples are drawn and measured, and the proxy does not train on them
    records["seed"].samples, records["seed"].detail["audit_samples"] = 40, 10
    records["proxy"].samples, records["measure"].samples = 40, 50
    run.write_ledger(records)
    summary = summarize(run)
    saving, measured = summary["cost"]["saving"], summary["counts"]["measured"] / 199
    # CPU seconds are twice the wall seconds of the fixture, except for the index
    assert saving["measured_share"] == measured
    assert saving["spent"] == 0.5 + 2 * (1 + 20 + 9 + 5 + 4) + 7
    training = (2 * 20 + 7) * 199 / 40
    assert saving["everything"] == pytest.approx(0.5 + 2 * (1 + 9) * 199 / 50 + training)
    headline = summary["headline"]
    assert headline is not None and headline["training_seconds"] == pytest.approx(training)
    assert saving["factor"] == pytest.approx(saving["everything"] / saving["spent"])
    assert [row["stage"] for row in summary["cost"]["stages"]][-1] == "select"


def test_no_saving_is_claimed_of_an_unfinished_run(make_run: MakeRun) -> None:
    run = make_run()
    records = run.ledger()
    records["extrapolate"].state = "failed"
    del records["select"]
    run.write_ledger(records)
    summary = summarize(run)
    assert summary["unfinished"] == ["extrapolate", "select"]
    assert summary["cost"]["saving"]["factor"] is None


def test_scores_that_are_not_finite_are_counted_and_left_out(make_run: MakeRun) -> None:
    run = make_run()
    table = storage.read_table(run.path("scores", "f001.parquet"))
    score = table["score"].to_numpy().copy()
    score[:3] = [np.nan, np.inf, -np.inf]
    storage.write_table(
        run.path("scores", "f001.parquet"), table.set_column(2, "score", pa.array(score))
    )
    summary = summarize(run)
    assert summary["counts"]["not_finite"] == 3
    assert (
        sum(sum(summary["scores"]["histogram"][name]) for name in ("measured", "extrapolated"))
        == 196
    )
    assert np.isfinite(summary["scores"]["high"])


def test_equal_scores_have_a_histogram_too(make_run: MakeRun) -> None:
    run = make_run()
    for file, table in storage.iter_tables(run.path("scores")):
        same = pa.array(np.full(len(table), 2.5, np.float32))
        storage.write_table(run.path("scores", file), table.set_column(2, "score", same))
    scores = summarize(run)["scores"]
    assert (scores["low"], scores["high"]) == (2.5, 2.5)
    assert scores["histogram"]["edges"][0] < 2.5 < scores["histogram"]["edges"][-1]


def test_samples_that_are_nowhere_are_noticed(make_run: MakeRun) -> None:
    run = make_run()
    storage.delete(run.path("scores", "f002.parquet"))
    assert summarize(run)["counts"]["accounted"] is False


def test_a_run_that_has_hardly_begun(make_run: MakeRun) -> None:
    run = make_run()
    for folder in ("index", "scores", "embeddings", "keep", "rejects", "extrapolator"):
        storage.delete(run.path(folder))
    run.write_ledger({"index": StageRecord("running")})
    summary = summarize(run)
    json.dumps(summary, allow_nan=False)
    assert summary["counts"]["samples"] == 0
    assert summary["keep"] == [] and summary["scores"]["histogram"] is None
    assert summary["fidelity"]["verdict"] == "unknown"


def test_without_a_run_there_is_an_error_that_names_the_place(tmp_path: Any) -> None:
    with pytest.raises(RunError, match="no run here"):
        summarize(Run(str(tmp_path)))
