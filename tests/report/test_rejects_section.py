"""Rejected samples in the report."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from raypipe import storage
from raypipe.report import summarize
from raypipe.runs.run import Run

MakeRun = Callable[..., Run]


def test_many_reject_reasons_stay_a_short_list(make_run: MakeRun) -> None:
    run = make_run()
    reasons = [f"label {number} is outside 0..2" for number in range(30)] + ["empty: 0 bytes"] * 9
    ids = [f"x{number}" for number in range(39)]
    storage.write_table(
        run.path("rejects", "f001.parquet"),
        pa.table({"sample_id": ids, "fragment": ["f001"] * 39, "reason": reasons}),
    )
    rejects = summarize(run)["rejects"]
    assert (rejects["samples"], rejects["distinct_reasons"], len(rejects["reasons"])) == (
        40,
        31,
        20,
    )
    assert rejects["reasons"][0] == {
        "reason": "empty: 0 bytes",
        "samples": 10,
        "example": "part-0#0",
    }
