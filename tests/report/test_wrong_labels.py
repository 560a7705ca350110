"""The report of a run with replaced labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from raypipe import storage
from raypipe.report import build, summarize
from raypipe.report.embeddings import scan_embeddings
from raypipe.report.label_noise import retrieval_figures
from raypipe.runs.run import Run
from raypipe.sources.noise import LabelNoise


def test_average_precision_is_that_of_scikit_learn_where_everything_is_listed() -> None:
    random = np.random.default_rng(0)
    wrong, score = random.random(300) < 0.2, random.normal(size=300)
    found = retrieval_figures(wrong[np.argsort(-score)], int(wrong.sum()))
    assert found["average_precision"] == pytest.approx(average_precision_score(wrong, score))
    assert found["precision"] == pytest.approx(wrong.mean()) and found["recall"] == 1
    first = found["at_replaced"]
    assert first["precision"] == first["recall"] == wrong[np.argsort(-score)][: wrong.sum()].mean()


def test_what_is_not_listed_is_not_found() -> None:
    found = retrieval_figures(np.array([True, False, True]), 8)
    assert (found["precision"], found["recall"]) == (2 / 3, 2 / 8)
    assert found["at_replaced"] == {"listed": 3, "found": 2, "precision": 2 / 3, "recall": 2 / 8}
    assert found["average_precision"] == (1 + 2 / 3) / 8
    short = retrieval_figures(np.array([True, False, True]), 2)["at_replaced"]
    assert (short["listed"], short["precision"], short["recall"]) == (2, 0.5, 0.5)
    none = retrieval_figures(np.zeros(0, bool), 5)
    assert (none["precision"], none["recall"], none["average_precision"]) == (None, 0, 0)
    assert retrieval_figures(np.zeros(2, bool), 0)["average_precision"] is None


def test_the_list_is_judged_by_what_was_replaced(make_run: Callable[..., Run]) -> None:
    run, noise = make_run(), LabelNoise(0.3)
    assert summarize(run)["label_noise"] is None
    records = run.ledger()
    records["index"].detail = {"inject_noise": {"share": 0.3, "seed": 0}}
    run.write_ledger(records)
    build(run)
    found = storage.read_json(run.path("report", "summary.json"))["label_noise"]
    suspects = scan_embeddings(
        run, np.inf, 10_000
    ).suspects  # the fixture's edge is a quantile of all scores
    low = np.quantile(
        [
            row
            for _, table in storage.iter_tables(run.path("scores"))
            for row in table["score"].to_pylist()
        ],
        0.2,
    )
    listed = [pick for pick in suspects if pick.score <= low]
    hits = [noise.replaced(pick.sample_id) for pick in listed]
    assert found["list"] == retrieval_figures(np.array(hits), found["replaced"]) and 0 < sum(
        hits
    ) < len(hits)
    rows = [
        row
        for _, table in storage.iter_tables(run.path("scores"))
        for row in table.to_pylist()
        if row["label"] is not None
    ]
    assert found["labelled"] == len(rows)
    assert found["replaced"] == sum(noise.replaced(row["sample_id"]) for row in rows)
    kept = storage.read_table(run.path("keep", "keep-0.30.parquet")).to_pylist()
    labelled = [noise.replaced(row["sample_id"]) for row in kept if row["label"] is not None]
    assert found["keep"]["keep-0.30.parquet"] == pytest.approx(sum(labelled) / len(labelled))
    page = storage.read_bytes(run.path("report", "index.html")).decode()
    assert (
        "30 % of the labels were replaced to test the detection of label noise: "
        "do not train on this run" in page
    )
    assert f"Of {len(listed)} samples listed as labels to check," in page
