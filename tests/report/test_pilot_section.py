"""The pilot on the page: headline, table, curve, and a headline where nothing is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from raypipe import storage
from raypipe.report import build, summarize
from raypipe.runs.pilot import RANDOM, Pilot, PilotCell, PilotPlan
from raypipe.runs.run import Run
from raypipe.stages.select.stage import write_keep_lists

CANDIDATES = (("ccs, strata 1", {"strategy": "ccs", "strata": 1}), ("ccs", {"strategy": "ccs"}))


def write_pilot(run: Run, gain: float, repeats: int = 6, note: str = "") -> None:
    """A pilot whose first candidate gains `gain` points in every cell per share pruned."""
    cells = tuple(
        PilotCell(keep, size, round(keep * size * 400))
        for size in (1.0, 0.5)
        for keep in (0.2, 0.35, 0.6)
    )
    plan = PilotPlan(CANDIDATES, cells if repeats else (), repeats, 400, 300, 3, 16, note)
    draw, correct = np.random.default_rng(0), {}
    for place, name in enumerate(plan.lists if repeats else ()):
        rate = [
            0.4 + 0.05 * np.log2(cell.samples / 50) + gain * (place == 1) * (1 - cell.keep)
            for cell in cells
        ]
        correct[name] = draw.random((6, repeats, 300)) < np.array(rate)[:, None, None]
    Pilot(plan, correct).write(run)


def auto_run(make_run: Callable[..., Run]) -> Run:
    run = make_run(select={"strategy": "auto", "keep": [0.3, 0.5]}, trust={"min_spearman": -1})
    records = run.ledger()
    records["extrapolate"].detail["score"] = "loss"
    run.write_ledger(records)
    return run


def test_a_gain_with_certainty_is_the_headline(make_run: Callable[..., Run]) -> None:
    run = auto_run(make_run)
    write_pilot(run, 0.3)
    write_keep_lists(run, run.config().select, trust=run.config().trust)
    summary = summarize(run)
    lead, pilot = summary["headline"], summary["pilot"]
    assert lead is not None and pilot is not None
    assert lead["candidate"] == "ccs, strata 1" and lead["strategy"] == "ccs"
    first = " ".join(lead["sentences"][:2])
    assert "costs about 50" in first and ") against a random list of the same size" in first
    assert ") against everything." in first and "extrapolated from 400 to 199" in first
    expected = lead["expected"]
    assert expected is not None and expected["against_random"] is not None
    assert expected["against_random"]["low"] > 0
    assert expected["against_everything"]["low"] < expected["against_everything"]["mean"]
    assert [listed["fraction"] for listed in pilot["lists"]] == [0.3, 0.5]
    assert pilot["lists"][1]["gains"]["ccs, strata 1"]["verdict"] == "better"
    page = storage.read_bytes(build(run)).decode()
    assert 'id="pilot-' in page or 'aria-label="Points gained' in page
    assert "small trainings" in page and "ccs, strata 1" in page


def test_without_evidence_the_list_is_random_and_says_so(make_run: Callable[..., Run]) -> None:
    run = auto_run(make_run)
    write_pilot(run, 0.0)
    write_keep_lists(run, run.config().select, trust=run.config().trust)
    lead = summarize(run)["headline"]
    assert lead is not None and lead["strategy"] == "random" and lead["candidate"] == ""
    assert "Random within classes: no candidate of the pilot is better" in lead["sentences"][1]
    expected = lead["expected"]
    assert expected is not None and expected["against_random"] is None
    assert expected["against_everything"]["mean"] < 0
    assert ") against everything." in lead["sentences"][1]


@pytest.mark.parametrize("strategy", ["auto", "top"])
def test_no_saving_is_stated_without_the_accuracy(
    make_run: Callable[..., Run], strategy: str
) -> None:
    """Neither without a pilot, nor with one that had no budget, nor for an explicit strategy."""
    run = make_run(select={"strategy": strategy, "keep": [0.5]}, trust={"min_spearman": -1})
    if strategy == "auto":
        write_pilot(run, 0.0, repeats=0, note="the budget allows too few trainings")
    write_keep_lists(run, run.config().select, trust=run.config().trust)
    lead = summarize(run)["headline"]
    assert lead is not None and lead["expected"] is None
    assert "costs about" in lead["sentences"][0]
    assert "What it does to the accuracy is not known" in lead["sentences"][1]
    page = storage.read_bytes(build(run)).decode()
    assert ("No evidence: the budget allows too few trainings." in page) == (strategy == "auto")


def test_a_damaged_result_is_an_error_that_names_it(make_run: Callable[..., Run]) -> None:
    from raypipe.errors import RunError

    run = auto_run(make_run)
    write_pilot(run, 0.0)
    content = storage.read_json(run.pilot_result)
    content["correct"][RANDOM] = content["correct"][RANDOM][:40]
    storage.write_json(run.pilot_result, content)
    with pytest.raises(RunError, match="damaged"):
        Pilot.read(run)
    content["format"] = 99
    storage.write_json(run.pilot_result, content)
    assert Pilot.read(run) is None
