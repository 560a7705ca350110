"""What the page says in special cases: clusters, attacks, folders of images, equal shares."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raypipe import storage
from raypipe.report import build
from raypipe.report.page import breakable
from raypipe.report.set_shares import uneven_sets
from raypipe.runs.run import Run

MakeRun = Callable[..., Run]


def text_of(run: Run) -> str:
    page = Path(build(run)).read_text("utf-8")
    page = page[page.index("<body>") :].replace("<wbr>", "")
    return " ".join(re.sub(r"<[^>]+>", " ", page).split()).replace("\u202f", " ")


def with_source(run: Run, **source: Any) -> Run:
    config = run.config()
    run.write_config(config.model_copy(update={"source": config.source.model_copy(update=source)}))
    return run


def test_labels_to_check_make_no_claim_about_their_number(make_run: MakeRun) -> None:
    text = text_of(make_run())
    assert "Labels to check" in text and "label error" not in text.lower()
    shown = re.search(r"Shown: (\d+) of (\d+) such samples\.", text)
    assert shown is None or "is no estimate of the wrong labels" in text


def test_clusters_have_no_wrong_labels(make_run: MakeRun) -> None:
    run = make_run(
        ("cluster-0", "cluster-1", "cluster-2"),
        source={"uri": "memory", "label_column": None},
        pseudo_labels={"clusters": 3},
    )
    text = text_of(run)
    assert "Between clusters" in text and "none of them is an error" in text
    assert "cluster: cluster-" in text
    for words in ("relabel", "label: cluster", "Labels to check", "no estimate of the wrong"):
        assert words not in text


def test_an_adversarial_run_says_so_at_the_top(make_run: MakeRun) -> None:
    run = make_run(proxy={"adversary": {"eps": 0.03}})
    assert "Adversarial run: the proxies were trained" in text_of(run)[:1500]
    assert "Adversarial" not in text_of(make_run())


@pytest.mark.parametrize(
    ("format", "words"), [("imagefolder", "200 files"), ("parquet", "4 files")]
)
def test_a_file_of_a_folder_is_an_image(make_run: MakeRun, format: str, words: str) -> None:
    run = with_source(make_run(), format=format)
    ledger = run.ledger()
    ledger["index"].detail = {"files": 4, "fragments": 4, "bytes": 1000}
    run.write_ledger(ledger)
    assert f"{words}, 4 fragments" in text_of(run)


def test_equal_shares_of_all_classes_are_one_number(make_run: MakeRun) -> None:
    run = make_run(("apple",), select={"keep": [0.3]})
    text = text_of(run)
    assert not re.search(r"from (\S+ %) of “apple” to \1 of “apple”", text)
    assert storage.exists(run.report_page)


def test_names_break_where_words_end() -> None:
    assert breakable("aquatic_mammals/<b>") == "aquatic_<wbr>mammals/<wbr>&lt;b&gt;"


def test_a_baseline_that_a_rehearsal_cannot_have_is_named(make_run: MakeRun) -> None:
    run, words = make_run(), "gnn-published is not among these rows"
    assert words not in text_of(run)
    file = run.path("extrapolator", "extrapolator.json")
    about = storage.read_json(file)
    about["fidelity"]["judged_on"] = "rehearsal"
    storage.write_json(file, about)
    assert words in text_of(run)


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
