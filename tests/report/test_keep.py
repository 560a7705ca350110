"""What keep-lists hold, what they save, and what the run cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import storage
from raypipe.errors import RunError
from raypipe.report import build, summarize
from raypipe.report.formats import money
from raypipe.report.keep_lists import even_classes, in_keep_list
from raypipe.report.savings import savings_sentences
from raypipe.report.text import without_secrets
from raypipe.runs.run import Run

MakeRun = Callable[..., Run]


def plain(text: str) -> str:
    return " ".join(text.split()).replace("\u202f", " ")


def test_which_samples_a_list_holds(make_run: MakeRun) -> None:
    run = make_run()
    kept = storage.read_table(run.path("keep", "keep-0.50.parquet"))["sample_id"].to_pylist()
    ids = ["nowhere", *kept[::7], "part-1#999", *kept[:1]]
    assert in_keep_list(run, "keep-0.50.parquet", ids).tolist() == [
        name in kept for name in ids[:-1]
    ] + [False]


def test_a_list_of_one_long_text_takes_little_memory(make_run: MakeRun) -> None:
    """60 GB of text in a file of kilobytes: each distinct text is examined once."""
    run = make_run()
    ids = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(60_000, np.int32)), pa.array(["z" * 1_000_000])
    )
    columns = {
        "sample_id": ids,
        "label": pa.array(np.zeros(60_000, np.int32)),
        "score": pa.array(np.zeros(60_000, np.float32)),
    }
    pq.write_table(pa.table(columns), run.path("keep", "keep-0.50.parquet"))
    assert in_keep_list(run, "keep-0.50.parquet", ["z", "z" * 1_000_000]).tolist() == [False, True]
    storage.write_bytes(run.path("keep", "keep-0.50.parquet"), b"PAR1")
    with pytest.raises(RunError, match=r"keep-0\.50\.parquet: not a readable keep-list"):
        in_keep_list(run, "keep-0.50.parquet", ["z"])


def test_how_even_classes_are() -> None:
    assert even_classes(np.array([5, 5, 5, 5])) == pytest.approx(4)
    assert even_classes(np.array([5, 0, 5, 0])) == pytest.approx(2)
    assert 1 < even_classes(np.array([99, 1])) < 1.1
    assert even_classes(np.zeros(3, np.int64)) == 0


def test_what_a_keep_list_saves(make_run: MakeRun) -> None:
    """The proxy took 40 CPU seconds for 199 samples; the fixture's stages up to the scores 78.5."""
    run = make_run(select={"keep": [0.25, 0.9]})
    records = run.ledger()
    records["proxy"].samples = 20
    run.write_ledger(records)
    lead = summarize(run)["headline"]
    assert (lead["fraction"], lead["samples"], lead["of"]) == (0.25, 50, 199)
    assert lead["saved_share"] == 1 - 50 / 199
    assert lead["training_seconds"] == pytest.approx(40 * 199 / 20)
    assert lead["saved_seconds"] == pytest.approx(398 * (1 - 50 / 199))
    assert lead["scores_seconds"] == 78.5 and lead["trainings"] == 1
    assert "took 1 min 18 s; they pay off with the first such training, or sooner" in plain(
        " ".join(lead["sentences"])
    )
    records["proxy"].samples = 2000
    run.write_ledger(records)
    lead = summarize(run)["headline"]
    assert lead["trainings"] == int(np.ceil(78.5 / (40 * 199 / 2000 * (1 - 50 / 199)))) == 27
    assert "they pay off after 27 such trainings" in plain(lead["sentences"][2])
    records["measure"].state = "failed"
    run.write_ledger(records)
    assert "pay off" not in " ".join(summarize(run)["headline"]["sentences"]), (
        "the cost of the scores is not known yet"
    )
    assert "holds every sample" in savings_sentences({**lead, "saved_share": 0.0})[0]


def test_an_evaluation_of_such_a_list_is_in_the_headline(make_run: MakeRun) -> None:
    run = make_run(select={"keep": [0.5]})
    record = run.ledger()["extrapolate"]
    point = {"fraction": 0.5, "accuracy": {"mean": 0.8, "low": 0.79, "high": 0.81}}
    lists = [
        {
            "name": name,
            "origin": origin,
            "strategy": strategy,
            "fractions": [{**point, "accuracy": {**point["accuracy"], "mean": mean}}],
        }
        for name, origin, strategy, mean in (
            ("a", "run", "random", 0.1),
            ("b", "measured:el2n", "top", 0.2),
            ("c", "run", "top", 0.75),
        )
    ]
    summary = {
        "format": 1,
        "scores_of": {"fingerprint": record.fingerprint, "finished": record.finished},
        "lists": lists,
        "random": [point],
        "full": {"accuracy": {"mean": 0.9, "low": None, "high": None}},
        "training": {"model": "resnet18"},
    }  # fmt: skip
    lists.insert(
        0, {**lists[2], "by_class": True, "fractions": lists[0]["fractions"]}
    )  # cut in another way
    storage.write_json(run.path("evaluation", "summary.json"), summary)
    found = summarize(run)["headline"]
    assert plain(found["sentences"][1]) == (
        "Trained on it here, resnet18 reached an accuracy of 75.0 ± -4.0 %; on random lists of the "
        "same size 80.0 ± 1.0 %, on everything 90.0 %."
    )
    storage.write_json(run.path("evaluation", "summary.json"), summary | {"scores_of": {}})
    assert summarize(run)["headline"]["trained"] is None, "made for earlier scores"


def test_lists_cut_within_each_class_say_so(make_run: MakeRun) -> None:
    run = make_run(select={"keep": [0.5], "strategy": "moderate", "by_class": True})
    assert [item["by_class"] for item in summarize(run)["keep"]] == [True]
    text = plain(Path(build(run)).read_text("utf-8"))
    assert (
        "moderate by class: the scores around the median, within each class" in text
        and "samples, moderate by class" in text
    )


def test_money_is_said_where_there_are_prices(make_run: MakeRun) -> None:
    run = make_run(report={"cpu_price": 36.0})
    cost = summarize(run)["cost"]
    assert {row["stage"]: row["dollars"] for row in cost["stages"]}["proxy"] == pytest.approx(0.4)
    assert cost["total"]["dollars"] == pytest.approx(sum(row["dollars"] for row in cost["stages"]))
    text = plain(Path(build(run)).read_text("utf-8"))
    assert (
        "Where the time and the money went" in text
        and "$0.40" in text
        and "at $36 per CPU hour." in text
    )
    assert [money(value) for value in (None, 0, 0.001, 1.5, 1234.5)] == [
        "–",
        "$0.00",
        "<$0.01",
        "$1.50",
        "$1,234",
    ]


def test_without_prices_there_is_no_money(make_run: MakeRun) -> None:
    run = make_run()
    assert summarize(run)["cost"]["total"]["dollars"] is None
    assert "money went" not in Path(build(run)).read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s3://AKIA:wJal@bucket/x", "s3://bucket/x"),
        ("https://h/p?x=1&X-Amz-Signature=abc&y=2", "https://h/p?x=1&X-Amz-Signature=…&y=2"),
        (
            "http://u@h:5000 said no, api_key is ?api_key=s3cr3t",
            "http://h:5000 said no, api_key is ?api_key=…",
        ),
        ("synthetic://?samples=1000&classes=10", "synthetic://?samples=1000&classes=10"),
        ("/data/a@b/c", "/data/a@b/c"),
    ],
)
def test_passwords_and_keys_are_taken_out(text: str, left: str) -> None:
    assert without_secrets(text) == left


def test_the_page_has_no_passwords(make_run: MakeRun) -> None:
    run = make_run(source={"uri": "s3://AKIA:wJalr@bucket/x", "include": "?token=wJalr"})
    page = Path(build(run)).read_text("utf-8")
    assert "wJalr" not in page + json.dumps(summarize(run)) and "s3://bucket/x" in page
