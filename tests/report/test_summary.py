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
from raypipe.report.text import (
    experimental,
    number,
    seconds,
    setting,
    share,
    trust_verdict,
    uneven_sets,
)
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


@pytest.mark.parametrize(
    ("spearman", "verdict"),
    [
        (-0.3, "weak"),
        (0.19, "weak"),
        (0.2, "modest"),
        (0.49, "modest"),
        (0.5, "good"),
        (0.79, "good"),
        (0.8, "strong"),
        (1.0, "strong"),
    ],
)
def test_verdicts(spearman: float, verdict: str) -> None:
    name, text = trust_verdict({"spearman": spearman, "n_held": 40}, {"value": 1.0}, 100)
    assert name == verdict
    assert text.startswith(f"Trust in these scores is {verdict}. Fidelity ")
    assert "measured scores on 40 seed samples held out of the fit" in text
    assert ("Do not prune" in text) == (verdict == "weak")


def test_no_score_is_strong_that_another_training_may_not_agree_with() -> None:
    assert trust_verdict({"spearman": 0.95}, {"value": 0.85}, 100)[0] == "strong"
    assert trust_verdict({"spearman": 0.95}, {"value": 0.6}, 100)[0] == "good"
    assert trust_verdict({"spearman": 0.95}, {"value": 0.1}, 100)[0] == "weak"
    name, text = trust_verdict({"spearman": 0.95}, {"note": "only one proxy"}, 100)
    assert name == "good"
    assert "Stability is unknown: only one proxy." in text


def test_uneven_shares_are_told_in_a_line_with_a_remedy_only_where_one_exists() -> None:
    def figures(share: float, within: bool) -> dict[str, Any]:
        return {"share": share, "low": 0.2, "high": 0.4, "within_chance": within}

    even = {name: figures(0.3, True) for name in ("seed", "audit", "rest")}
    assert uneven_sets({"keep-0.30.parquet": even}, False) == ""
    favoured = {**even, "seed": figures(0.45, False)}
    told = uneven_sets({"keep-0.30.parquet": favoured, "keep-0.50.parquet": even}, False)
    assert told.startswith("1 of 2 keep-lists treat measured samples differently: keep-0.30")
    assert told.endswith("Set proxy.parts to 3 for cross-fitting.")
    assert "proxy.parts" not in uneven_sets({"keep-0.30.parquet": favoured}, True)


def test_an_experimental_score_is_called_so() -> None:
    assert "moso is an experimental score: two trainings agreed to less than 0.6" in experimental(
        "moso"
    )
    assert experimental("loss") == "" == experimental(None)


def test_a_baseline_that_does_as_well_is_named() -> None:
    rivals = {"knn": {"spearman": 0.75}, "random": {"spearman": None}}
    assert (
        "“knn” does as well here (0.75)"
        in trust_verdict({"spearman": 0.7, "baselines": rivals}, {}, 10)[1]
    )
    assert "does as well" not in trust_verdict({"spearman": 0.8, "baselines": rivals}, {}, 10)[1]
    itself = {
        "spearman": 0.7,
        "method": "knn-published",
        "baselines": {"knn_published": {"spearman": 0.7}},
    }
    assert "does as well" not in trust_verdict(itself, {}, 10)[1]


def test_a_fully_measured_source_needs_no_fidelity() -> None:
    assert trust_verdict({"spearman": 0.1}, {}, 0)[0] == "measured"


def test_words() -> None:
    plain = [
        text.replace("\u202f", " ") for text in map(seconds, (0.04, 9.96, 59.7, 200, 3600, 90061))
    ]
    assert plain == ["0.0 s", "10.0 s", "1 min", "3 min 20 s", "1 h", "1 d 1 h"]
    assert [share(value, 0).replace("\u202f", " ") for value in (0, 0.001, 0.125, 0.999, 1)] == [
        "0 %",
        "<1 %",
        "12 %",
        ">99 %",
        "100 %",
    ]
    assert share(0.125).replace("\u202f", " ") == "12.5 %"
    assert [number(value) for value in (0.04, -1.5e-7, 123.0, 0.0)] == [
        "0.0400",
        "−1.50e−7",
        "123",
        "0.00",
    ]
    assert [setting(value) for value in (True, None, (0.3, 0.5), "x")] == [
        "true",
        "–",
        "0.3, 0.5",
        "x",
    ]
