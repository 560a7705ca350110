"""Report: one HTML page and `summary.json`, from the files of the run."""

from __future__ import annotations

import time
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.report import build
from raypipe.report.trackers import log_report
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.base import Stage


class ReportStage(Stage):
    """Write the report and log it to experiment trackers."""

    name = "report"
    needs = ("select",)

    def settings(self, config: Config) -> dict[str, Any]:
        return config.report.model_dump(mode="json")

    def complete(self, context: Context, record: StageRecord) -> bool:
        written = {"index.html", "summary.json"} <= storage.names(context.run.report_folder)
        logged = record.detail.get("logged", []) == list(context.config.report.log_to)
        return written and logged and record.detail.get("of") == _state(context.run)

    def execute(self, context: Context, record: StageRecord) -> None:
        started, run, settings = time.process_time(), context.run, context.config.report
        build_report(run)
        record.samples = run.ledger()["extrapolate"].samples
        record.detail = {"of": _state(run)}
        # Trackers come from the configuration of this process, never from the run's folder: a
        # report on the run of someone else must not log anywhere.
        failed: dict[str, str] = {}
        if settings.log_to:
            summary = storage.read_json(run.report_summary)
            failed = log_report(run, summary, settings.log_to, settings.experiment)
            record.detail["logged"] = [name for name in settings.log_to if name not in failed]
        for name, reason in failed.items():
            context.progress.say(
                f"note: the report is written, but {name} did not accept it ({reason}); "
                "run again to retry"
            )
        record.cpu_seconds += time.process_time() - started


def build_report(run: Run) -> str:
    """Write `RUN/report/summary.json` and `RUN/report/index.html`.

    Returns
    -------
    str
        URI of the page.

    Raises
    ------
    RunError
        When there is no run.
    """
    return build(run)


def _state(run: Run) -> dict[str, Any]:
    """Return what the report shows: when each stage ended, and the keep-lists that exist."""
    ended = {
        stage: record.finished
        for stage, record in run.ledger().items()
        if stage != ReportStage.name
    }
    return {"ended": ended, "keep": sorted(storage.names(run.keep_folder))}
