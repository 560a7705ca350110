"""Stages without Ray: units are processed one after another in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from helpers import QUIET

from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.index.stage import IndexStage
from raypipe.stages.seed.stage import SeedStage


def run_tasks(
    units: Sequence[Any], function: Callable[[Any], Any], on_result: Callable[[Any], None], **_: Any
) -> None:
    for unit in units:
        on_result(function(unit))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tasks in this process."""
    monkeypatch.setattr("raypipe.distributed.tasks.run_tasks", run_tasks)
    monkeypatch.setattr(Context, "cluster", None)


def index(config: Config) -> StageRecord:
    """Write or update the index of a run. Needs `no_ray`."""
    return _execute(IndexStage(), config)


def seed(config: Config) -> StageRecord:
    """Draw the seed set of a run that has an index. Needs `no_ray`."""
    return _execute(SeedStage(), config)


def _execute(stage: Any, config: Config) -> StageRecord:
    record = StageRecord(detail=dict(stage.detail))
    stage.execute(Context(config, Run(config.run), QUIET), record)
    return record
