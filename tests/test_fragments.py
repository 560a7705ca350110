"""benchmarks/fragments.py in small: the driver's time and memory for a fragment are within what 100,000 of them may take."""

from __future__ import annotations

import importlib
import tracemalloc
from pathlib import Path

import pytest

from raypipe.runs.layout import Run
from raypipe.runs.status import describe_run

COUNT = 2000
SHARE = COUNT / 100_000


def test_the_driver_of_very_many_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    fragments = importlib.import_module("fragments")
    tracemalloc.start()
    try:
        steps = list(fragments.simulate(str(tmp_path), COUNT))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [name for name, _ in steps] == [
        "index",
        "killed",
        "status",
        "decision",
        "rest",
        "scores",
        "all done",
        "status",
    ]
    found = dict(steps)
    run = Run(f"{tmp_path}/run")
    assert len(run.fragments()) == COUNT and run.done("embeddings") == run.done("scores")
    assert (
        run.ledger()["embed"].attempts == 2
        and run.ledger()["embed"].samples == COUNT * fragments.FRAGMENT_SAMPLES
    )
    # processor seconds, which other work on the machine does not change much; tracing makes them several times as many
    assert found["decision"]["processor"] < 30 * SHARE + 1
    assert found["all done"]["processor"] < 30 * SHARE + 1
    assert found["status"]["processor"] < 10 * SHARE + 1
    assert peak < 1e9 * SHARE, "bytes of the driver: 1 GB for 100,000 fragments"
    assert fragments.sizes(run)["index"] < 100 * COUNT and fragments.sizes(run)["ledger"] < 50_000
    assert any(line.startswith("embed       done") for line in describe_run(run.uri))
