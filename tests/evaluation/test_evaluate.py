"""An evaluation of a finished run: what it trains, what it writes, and that it trains nothing twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import QUIET

import raypipe
from raypipe import storage
from raypipe.errors import ConfigError, ResourceError, SourceError
from raypipe.evaluation import running
from raypipe.evaluation.lists import FULL, RANDOM, cut_lists
from raypipe.evaluation.outcome import describe
from raypipe.rundir import Run
from raypipe.settings.evaluate import EvaluateSettings

pytestmark = pytest.mark.ray
OPTIONS: dict[str, Any] = {"keep": [0.25, 0.5], "seeds": 2, "epochs": 1, "strategies": ["top", "ccs"]}


@pytest.fixture
def run(finished: str, tmp_path: Path) -> Run:
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return Run(str(tmp_path / "run"))


def _evaluate(run: Run, **options: Any) -> dict[str, Any]:
    return raypipe.evaluate(run.uri, "digits://", progress=QUIET, **{**OPTIONS, **options})


def test_an_evaluation_and_that_it_trains_nothing_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = _evaluate(run)
    scored = pq.read_table(run.path("scores")).num_rows
    # full set, random lists and two lists of each fraction, with two seeds; fractions 0.25 and 0.5
    assert summary["trainings"] == 2 + 4 + 8
    # the source of the run is the first 600 digits: the test set is the others
    assert summary["test"] == {"uri": "digits://", "samples": 1797 - scored, "left_out": scored}
    assert summary["full"]["samples"] == scored and summary["unit"] == "CPU"
    assert [listed["name"] for listed in summary["lists"]] == ["moso, top", "moso, ccs"]
    for listed in summary["lists"]:
        assert [found["samples"] for found in listed["fractions"]] == [round(0.25 * scored), round(0.5 * scored)]
        assert all(found["difference"]["seeds"] == 2 for found in listed["fractions"])
        assert listed["sentence"].startswith(listed["name"])
    even = summary["lists"][0]["fractions"][0]["break_even"]
    ledger = run.ledger()
    spent = sum(ledger[stage].cpu_seconds for stage in ("index", "seed", "proxy", "measure", "embed", "extrapolate"))
    assert even["scoring"] == pytest.approx(spent) and even["net"] == pytest.approx(even["saved"] - spent)
    table = pq.read_table(run.path("evaluation", "trainings.parquet")).to_pylist()
    assert len(table) == 14 and {row["list"] for row in table} == {FULL, RANDOM, "moso, top", "moso, ccs"}
    assert all(0 <= row["worst_class_accuracy"] <= row["accuracy"] <= 1 and row["cpu_seconds"] > 0 for row in table)
    shown = storage.read_json(run.path("report", "summary.json"))["evaluation"]
    assert not shown.pop("outdated") and shown == summary
    assert "Does it help?" in Path(run.path("report", "index.html")).read_text("utf-8")
    lines = list(describe(summary))
    assert any(line.startswith("moso, ccs") for line in lines) and lines[-1] == summary["lists"][1]["sentence"]
    assert "pixels" not in storage.entries(run.path("evaluation"))

    # again, nothing is trained, and everything is said alike; one result that is gone is made again, to the same figures
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(running, "run_on", refuse)
        again = _evaluate(run)
        assert {**again, "made": ""} == {**summary, "made": ""}
    gone = next(row for row in table if row["list"] == "moso, top")
    before = storage.read_json(run.path("evaluation", f"{gone['fingerprint']}.json"))
    storage.delete(run.path("evaluation", f"{gone['fingerprint']}.json"))
    trained: list[Any] = []
    run_on = running.run_on
    monkeypatch.setattr(running, "run_on", lambda units, *rest: trained.extend(units) or run_on(units, *rest))
    _evaluate(run)
    after = storage.read_json(run.path("evaluation", f"{gone['fingerprint']}.json"))
    assert [item.name for item in trained] == [gone["fingerprint"]] and after["accuracy"] == before["accuracy"]


def test_lists_are_the_keep_lists_of_the_run(run: Run) -> None:
    config = run.config()
    pool, lists = cut_lists(run, config, EvaluateSettings.model_validate({"keep": [0.25, 0.5], "seeds": 2}))
    ids = np.array(pq.read_table(run.path("scores"), columns=["sample_id"])["sample_id"].to_pylist())
    assert len(pool) == len(ids)
    own = [listed for listed in lists if listed.strategy]
    assert [(listed.name, listed.fraction) for listed in own] == [("moso, top", 0.25), ("moso, top", 0.5)]
    for listed in own:
        kept = raypipe.KeepList(run.uri, listed.fraction)
        assert set(ids[listed.rows]) == set(kept)
    drawn = [listed for listed in lists if listed.name == RANDOM]
    assert [(listed.draw, listed.fraction) for listed in drawn] == [(0, 0.25), (0, 0.5), (1, 0.25), (1, 0.5)]
    assert len({listed.digest for listed in drawn}) == 4 and {len(listed.rows) for listed in drawn} == {len(x.rows) for x in own}


def test_scores_of_another_run_are_lists_as_well(run: Run, finished: str) -> None:
    table = pq.read_table(run.path("scores"))
    values = dict(zip(table["sample_id"].to_pylist(), table["score"].to_pylist(), strict=True))
    settings = {"keep": [0.5], "seeds": 1, "beside": [finished]}
    _, lists = cut_lists(run, run.config(), EvaluateSettings.model_validate(settings))
    first, second = (listed for listed in lists if listed.strategy)
    assert second.name == "moso of run, top" and np.array_equal(first.rows, second.rows)
    # a score that was measured of everything is a list too; here, made so
    storage.delete(run.path("measured"))
    reverse = pq.read_table(run.path("scores"), columns=["sample_id", "label"])
    storage.write_table(run.path("measured", "all.parquet"), reverse.append_column("el2n", [[-values[i] for i in values]]))
    _, lists = cut_lists(run, run.config(), EvaluateSettings.model_validate({"keep": [0.5], "seeds": 1}))
    first, second = (listed for listed in lists if listed.strategy)
    assert second.name == "el2n measured, top" and len(set(first.rows) & set(second.rows)) <= 2


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run_on", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=r"measured:grand was measured of \d+ samples, but not of \d+ others"):
        _evaluate(run, scores=["measured:grand"])
    with pytest.raises(ConfigError, match=r"keep \(0.95\) and hard_cutoff"):
        _evaluate(run, keep=[0.95])
    with pytest.raises(SourceError, match="no labelled, readable sample is left to test on, and its samples that the run scored"):
        raypipe.evaluate(run.uri, "digits://", test_settings=["limit=600"], progress=QUIET, **OPTIONS)
    monkeypatch.setattr(running, "_smallest_memory", lambda: 1e5)
    with pytest.raises(ResourceError, match="GiB of memory"):
        _evaluate(run)
    assert not any(name.endswith(".json") and not name.startswith("data") for name in storage.names(run.path("evaluation")))
    assert json.loads(Path(run.path("run.json")).read_text())["stages"]["report"]["state"] == "done"
