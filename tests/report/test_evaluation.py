"""The evaluation on the page: curves, table, sentences, and a note if it is outdated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raypipe import storage
from raypipe.report import build, summarize
from raypipe.runs.run import Run


def _interval(mean: float, reach: float | None = 0.02) -> dict[str, Any]:
    ends = (None, None) if reach is None else (mean - reach, mean + reach)
    return {"mean": mean, "low": ends[0], "high": ends[1], "seeds": 3 if reach else 1}


def _point(fraction: float, mean: float, reach: float | None) -> dict[str, Any]:
    even = {
        "unit": "CPU",
        "saved": 90.0 * (1 - fraction),
        "scoring": 40.0,
        "net": 50.0,
        "trainings": 1,
    }
    figures = {
        "fraction": fraction,
        "samples": 100,
        "accuracy": _interval(mean, reach),
        "worst_class": _interval(mean / 2, reach),
    }
    return {
        **figures,
        "seconds": 10.0,
        "difference": {**_interval(-0.1, reach), "verdict": "worse"},
        "break_even": even,
    }


def _written(run: Run, reach: float | None = 0.02, name: str = "moso, top") -> None:
    record = run.ledger()["extrapolate"]
    listed = {
        "name": name,
        "sentence": f"{name}: worse than random at 0.3 and 0.5: do not prune with it",
    }
    fractions = [_point(fraction, 0.4 + fraction / 3, reach) for fraction in (0.3, 0.5)]
    summary = {
        "format": 1,
        "scores_of": {"fingerprint": record.fingerprint, "finished": record.finished},
        "seeds": 3, "protocol": "epochs", "unit": "CPU", "full": _point(1.0, 0.9, reach),
        "training": {"model": "resnet18", "image_size": 32, "epochs": 7},
        "test": {"uri": "s3://b/<test>", "samples": 1234, "left_out": 0},
        "scoring_seconds": {"cpu_seconds": 40.0, "gpu_seconds": 0.0},
        "random": [_point(fraction, 0.5 + fraction / 3, reach) for fraction in (0.3, 0.5)],
        "lists": [{**listed, "fractions": fractions}],
    }  # fmt: skip
    storage.write_json(run.path("evaluation", "summary.json"), summary)


@pytest.mark.parametrize("reach", [0.02, None])
def test_the_page_says_whether_it_helps(make_run: Callable[..., Run], reach: float | None) -> None:
    run = make_run()
    assert summarize(run)["evaluation"] is None
    _written(run, reach, "<moso>, top")
    page = Path(build(run)).read_text("utf-8")
    assert "worse than random at 0.3 and 0.5: do not prune with it." in page
    assert "Accuracy against keep fraction" in page and "1,234 samples" in page
    assert "<moso>" not in page and "<test>" not in page  # escaped, in plot, table and text
    assert ("60.0 ± 2.0" in page) == (reach is not None)
    assert "for earlier scores" not in page


def test_an_evaluation_of_other_scores_is_said_to_be_one(make_run: Callable[..., Run]) -> None:
    run = make_run()
    _written(run)
    ledger = run.ledger()
    ledger["extrapolate"].finished = "later"
    run.write_ledger(ledger)
    assert summarize(run)["evaluation"]["outdated"]
    assert "This evaluation is of earlier scores" in Path(build(run)).read_text("utf-8")


def test_what_cannot_be_understood_is_left_out(make_run: Callable[..., Run]) -> None:
    run = make_run()
    for content in (b"{", b"[]", b'{"format": 99}'):
        storage.write_bytes(run.path("evaluation", "summary.json"), content)
        assert summarize(run)["evaluation"] is None
