"""An evaluation of a run: what it trains, what it writes, and that it trains nothing twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET, small_config

import raypipe
from raypipe import storage
from raypipe.config.evaluate import EvaluateSettings
from raypipe.errors import ConfigError, ResourceError, RunError, SourceError, StageError
from raypipe.evaluation import driver, trainings
from raypipe.evaluation.lists import FULL, RANDOM, cut_lists
from raypipe.evaluation.summary import describe_evaluation
from raypipe.runs.run import Run
from raypipe.stages.select.stage import write_keep_lists

OPTIONS: dict[str, Any] = {
    "keep": [0.25, 0.5],
    "seeds": 2,
    "epochs": 1,
    "strategies": ["top", "ccs"],
}


def _evaluate(
    run: Run, test_settings: tuple[str, ...] = ("limit=300",), **options: Any
) -> dict[str, Any]:
    return raypipe.evaluate(
        run.uri, "digits://", test_settings=test_settings, progress=QUIET, **{**OPTIONS, **options}
    )


def _lists(run: Run, **settings: Any) -> tuple[Any, list[Any], list[Any]]:
    """The pool, the lists of scores, and the random ones."""
    pool, lists = cut_lists(
        run, run.config(), EvaluateSettings.model_validate({"keep": [0.5], "seeds": 1, **settings})
    )
    return (
        pool,
        [listed for listed in lists if listed.strategy],
        [listed for listed in lists if listed.name == RANDOM],
    )


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("something was trained")


def test_an_evaluation_and_that_it_trains_nothing_twice(
    scored: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, summary = scored, _evaluate(scored)
    # full set, random lists and two lists of each fraction, with two seeds; fractions 0.25 and 0.5
    assert summary["trainings"] == 2 + 4 + 8
    assert summary["test"] == {"uri": "digits://", "samples": 100, "left_out": 200}
    assert (
        summary["full"]["samples"] == 198 and summary["unit"] == "CPU" and summary["samples"] == 198
    )
    assert [listed["name"] for listed in summary["lists"]] == ["moso, top", "moso, ccs by class"]
    for listed in summary["lists"]:
        assert [found["fraction"] for found in listed["fractions"]] == [0.25, 0.5]
        assert all(found["difference"]["seeds"] == 2 for found in listed["fractions"])
        assert listed["sentence"].startswith(f"{listed['name']}: ")
    even = summary["lists"][0]["fractions"][0]["break_even"]
    assert even["scoring"] == 48.0 and even["net"] == pytest.approx(
        even["saved"] - 48.0
    )  # keep-lists and report are no scores
    rows = pq.read_table(run.path("evaluation", "trainings.parquet")).to_pylist()
    assert len(rows) == 14 and {row["list"] for row in rows} == {
        FULL,
        RANDOM,
        "moso, top",
        "moso, ccs by class",
    }
    assert all(
        0 <= row["worst_class_accuracy"] <= row["accuracy"] <= 1 and row["cpu_seconds"] > 0
        for row in rows
    )
    by_seed = {
        row["seed"]: row["accuracy"]
        for row in rows
        if (row["list"], row["fraction"]) == ("moso, ccs by class", 0.5)
    }
    random = {
        row["seed"]: row["accuracy"]
        for row in rows
        if (row["list"], row["fraction"]) == (RANDOM, 0.5)
    }
    stated = summary["lists"][1]["fractions"][1]
    assert stated["accuracy"]["mean"] == pytest.approx(np.mean(list(by_seed.values())))
    assert stated["difference"]["mean"] == pytest.approx(
        np.mean([by_seed[seed] - random[seed] for seed in (0, 1)])
    )
    lines = list(describe_evaluation(summary))
    assert (
        sum(line.startswith("moso, ccs by class  ") for line in lines) == 2
        and lines[-1] == summary["lists"][1]["sentence"]
    )
    assert "pixels" not in storage.entries(run.path("evaluation"))

    with monkeypatch.context() as patch:
        patch.setattr(driver, "run_on_share", _refuse)
        assert {**_evaluate(run), "made": ""} == {**summary, "made": ""}
    # one that is gone is made again, to the same figures, and no other
    gone = next(row for row in rows if row["list"] == "moso, top")
    file = run.path("evaluation", f"{gone['fingerprint']}.json")
    storage.delete(file)
    stamps = {item.path: item.stamp for item in storage.listing(run.path("evaluation"))}
    _evaluate(run)
    assert storage.read_json(file)["accuracy"] == gone["accuracy"]
    after = {item.path: item.stamp for item in storage.listing(run.path("evaluation"))}
    changed = {path for path, stamp in stamps.items() if after[path] != stamp}
    assert changed <= {"summary.json", "trainings.parquet"} | {
        path for path in stamps if path.startswith("data-")
    }


def test_under_attack_robust_accuracy_stands_beside_accuracy(scored: Run) -> None:
    summary = _evaluate(scored, keep=[0.5], seeds=2, strategies=["top"], attack=True)
    assert summary["training"]["adversary"] == {
        "eps": 8 / 255,
        "step_size": 2 / 255,
        "iterations": 7,
    }
    rows = pq.read_table(scored.path("evaluation", "trainings.parquet")).to_pylist()
    assert all(0 <= row["robust_accuracy"] <= row["accuracy"] for row in rows)
    (listed,) = summary["lists"]
    (found,) = listed["fractions"]
    robust = {
        name: {row["seed"]: row["robust_accuracy"] for row in rows if row["list"] == name}
        for name in (RANDOM, listed["name"])
    }
    assert found["robust_accuracy"]["mean"] == pytest.approx(
        np.mean(list(robust[listed["name"]].values()))
    )
    gaps = [robust[listed["name"]][seed] - robust[RANDOM][seed] for seed in (0, 1)]
    assert found["robust_difference"]["mean"] == pytest.approx(np.mean(gaps))
    assert "moso, top, under attack: " in listed["sentence"]
    lines = list(describe_evaluation(summary))
    assert any("7 steps of 2/255 within 8/255" in line for line in lines)
    assert any(line.count("against random") == 2 and "under attack" in line for line in lines)


def test_trainings_that_take_other_samples_in_every_epoch(scored: Run) -> None:
    kinds = ["redrawn", "redrawn-by-score", "infobatch"]
    summary = _evaluate(scored, keep=[0.25], seeds=1, epochs=4, strategies=["top"], dynamic=kinds)
    names = ["redrawn", "moso, redrawn-by-score", "infobatch", "moso, top"]
    assert [listed["name"] for listed in summary["lists"]] == names
    rows = pq.read_table(scored.path("evaluation", "trainings.parquet")).to_pylist()
    by_name = {row["list"]: row for row in rows}
    for name in names:
        assert by_name[name]["steps"] == by_name[RANDOM]["steps"] < by_name[FULL]["steps"]
        assert by_name[name]["samples"] in (49, 50)  # of 198 with a label and of 200
    # only what uses scores has to pay for them
    scoring = {
        item["name"]: item["fractions"][0]["break_even"]["scoring"] for item in summary["lists"]
    }
    assert scoring == dict(zip(names, [0.0, 48.0, 0.0, 48.0], strict=True))


def test_strategies_that_compare_embeddings_are_evaluated(scored: Run) -> None:
    settings = scored.config().select
    _, (evaluated,), _ = _lists(scored, strategies=["coverage"])
    assert evaluated.name == "moso, coverage by class"
    changed = settings.model_copy(update={"strategy": "coverage", "keep": (0.5,)})
    write_keep_lists(scored, changed, scored.config().trust)
    kept = set(raypipe.KeepList(scored.uri, 0.5))
    names = [f"digits/{row:04d}" for row in range(198)]
    assert {names[row] for row in evaluated.rows} == kept & set(names)


def test_a_training_that_was_killed_goes_on(scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"keep": [0.5], "seeds": 1, "strategies": ["top"], "epochs": 2}
    whole = _evaluate(scored, **options)
    name = pq.read_table(scored.path("evaluation", "trainings.parquet")).to_pylist()[-1][
        "fingerprint"
    ]
    result = storage.read_json(scored.path("evaluation", f"{name}.json"))
    storage.delete(scored.path("evaluation", f"{name}.json"))
    monkeypatch.setattr(trainings, "SAVE_SECONDS", 0.0)
    fit, epochs = trainings.fit, list[int]()

    def dies(*given: Any, save: Any, **more: Any) -> Any:
        def and_dies(state: Any) -> None:
            save(state)
            raise StageError("killed")

        return fit(*given, save=and_dies, **more)

    monkeypatch.setattr(trainings, "fit", dies)
    with pytest.raises(StageError, match="killed"):
        _evaluate(scored, **options)
    assert f"{name}.safetensors" in storage.names(scored.path("evaluation"))

    def noting(*given: Any, state: Any, **more: Any) -> Any:
        epochs.append(int(state["epoch"]))
        return fit(*given, state=state, **more)

    monkeypatch.setattr(trainings, "fit", noting)
    again = _evaluate(scored, **options)
    assert epochs == [0]
    assert (
        again["lists"][0]["fractions"][0]["accuracy"]
        == whole["lists"][0]["fractions"][0]["accuracy"]
    )
    assert (
        storage.read_json(scored.path("evaluation", f"{name}.json"))["per_class"]
        == result["per_class"]
    )
    assert f"{name}.safetensors" not in storage.names(scored.path("evaluation"))


def test_lists_are_the_keep_lists_of_the_run_but_for_the_unlabelled(scored: Run) -> None:
    config = scored.config()
    select = config.select.model_copy(update={"keep": (0.25, 0.5)})
    write_keep_lists(scored, select, config.trust)
    table = pq.read_table(scored.path("scores"))
    labelled = [
        name
        for name, label in zip(table["sample_id"].to_pylist(), table["label"].to_pylist())
        if label is not None
    ]
    pool, own, drawn = _lists(scored, keep=[0.25, 0.5], seeds=2)
    assert len(pool) == len(labelled) == 198
    assert [(listed.name, listed.fraction) for listed in own] == [
        ("moso, top", 0.25),
        ("moso, top", 0.5),
    ]
    for listed in own:
        kept = raypipe.KeepList(scored.uri, listed.fraction)
        assert {labelled[row] for row in listed.rows} == set(kept) & set(labelled)
    assert [(listed.draw, listed.fraction) for listed in drawn] == [
        (0, 0.25),
        (0, 0.5),
        (1, 0.25),
        (1, 0.5),
    ]
    assert len({listed.digest for listed in drawn}) == 4


def test_other_scores_are_lists_as_well(scored: Run, tmp_path: Path) -> None:
    shutil.copytree(scored.uri, tmp_path / "other")
    _, (first, second), _ = _lists(scored, beside=[str(tmp_path / "other")])
    assert second.name == "moso of other, top" and np.array_equal(first.rows, second.rows)
    # one that was measured of every sample, in the opposite order
    table = pq.read_table(scored.path("scores"))
    measured = {
        "sample_id": table["sample_id"],
        "label": table["label"],
        "el2n": [-value for value in table["score"].to_pylist()],
    }
    storage.write_table(scored.path("measured", "all.parquet"), pa.table(measured))
    _, (first, second), _ = _lists(scored)
    assert second.name == "el2n measured, top" and not set(first.rows) & set(second.rows)
    _, (only,), _ = _lists(scored, scores=["measured:el2n"])
    assert np.array_equal(only.rows, second.rows)
    storage.write_table(scored.path("measured", "all.parquet"), pa.table(measured).slice(0, 150))
    assert len(_lists(scored)[1]) == 1
    with pytest.raises(
        ConfigError, match="measured:el2n was measured on 150 samples, but not on 50 others"
    ):
        _lists(scored, scores=["measured:el2n"])


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    scored: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "run_on_share", _refuse)
    scored.write_config(small_config(scored.uri, "source.limit=200", "select.hard_cutoff=0.1"))
    with pytest.raises(ConfigError, match=r"keep \(0.95\) plus hard_cutoff"):
        _evaluate(scored, keep=[0.95])
    with pytest.raises(SourceError, match=r"to test on \(those that the run scored are left out\)"):
        _evaluate(scored, ("limit=200",))
    monkeypatch.setattr(driver, "smallest_memory", lambda: 1e4)
    with pytest.raises(ResourceError, match="GiB of memory"):
        _evaluate(scored)
    with pytest.raises(ResourceError, match="cpus_per_training is 3, but the largest node"):
        monkeypatch.setattr(driver, "smallest_memory", lambda: 1e9)
        _evaluate(scored, cpus_per_training=3)
    records = scored.ledger()
    records["extrapolate"].state = "failed"
    scored.write_ledger(records)
    with pytest.raises(RunError, match="stage extrapolate is not finished"):
        _evaluate(scored)


@pytest.mark.ray
def test_on_a_cluster(cluster: str, scored_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(scored_run.path("report", "index.html"), b"as it was before")
    options = {"seeds": 1, "strategies": ["top"], "keep": [0.5]}
    summary = _evaluate(scored_run, **options)
    assert summary["trainings"] == 1 + 1 + 1 and summary["test"] == {
        "uri": "digits://",
        "samples": 100,
        "left_out": 200,
    }
    shown = storage.read_json(scored_run.path("report", "summary.json"))["evaluation"]
    assert not shown.pop("outdated") and shown == summary
    assert "Does it help?" in Path(scored_run.path("report", "index.html")).read_text("utf-8")
    monkeypatch.setattr(driver, "run_on_share", _refuse)
    assert {**_evaluate(scored_run, **options), "made": ""} == {**summary, "made": ""}
