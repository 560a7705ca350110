"""Report: one HTML page and `summary.json`, from the files of the run."""

from __future__ import annotations

import time
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.report import build
from raypipe.rundir import Run, StageRecord
from raypipe.stages.base import Context, Stage


class ReportStage(Stage):
    name = "report"
    needs = ("select",)

    def settings(self, config: Config) -> dict[str, Any]:
        return config.report.model_dump(mode="json")

    def complete(self, context: Context, record: StageRecord) -> bool:
        written = {"index.html", "summary.json"} <= storage.names(context.run.path("report"))
        return written and record.detail.get("of") == _state(context.run)

    def execute(self, context: Context, record: StageRecord) -> None:
        started = time.process_time()
        build_report(context.run)
        record.samples = context.run.ledger()["extrapolate"].samples
        record.detail = {"of": _state(context.run)}
        record.cpu_seconds += time.process_time() - started


def build_report(run: Run) -> str:
    """Write `RUN/report/summary.json` and `RUN/report/index.html`; returns the URI of the page. Raises RunError without a run."""
    return build(run)


def _state(run: Run) -> dict[str, Any]:
    """What the report shows: when each stage ended, and which keep-lists there are."""
    ended = {stage: record.finished for stage, record in run.ledger().items() if stage != ReportStage.name}
    return {"ended": ended, "keep": sorted(storage.names(run.path("keep")))}
