"""The ledger counts the work that the outputs of a stage rest on, also that of earlier settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, small_config
from test_intermediate import AT_CHECKPOINTS, FROM_TRAJECTORY, trained

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.pipeline import advance
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.measure.gradient_job import GradientFolders
from raypipe.stages.measure.stage import MeasureStage
from raypipe.stages.measure.trajectories import trajectory_folder


def measured(folder: Path, *scores: str) -> tuple[Config, Context]:
    """A run whose proxy is trained, and the folder of what its scores were combined from."""
    config = small_config(f"{folder}/run", *scores)
    run = Run(config.run)
    trained(run, config)
    run.write_ledger({"proxy": StageRecord("done", "proxy")})
    of = GradientFolders.of(config, run).gradients
    if config.measure.from_trajectory:
        of = trajectory_folder(config, run)
    storage.write_bytes(run.path(of, "part-0", "x"), b"x")
    return config, Context(config, run, QUIET)


@pytest.mark.parametrize(
    "scores, change, reused",
    [
        (AT_CHECKPOINTS, "measure.moso.weights=none", True),
        (AT_CHECKPOINTS, "measure.precision=bfloat16", False),
        (FROM_TRAJECTORY, "select.keep=[0.5]", True),
        (FROM_TRAJECTORY, "measure.loss.last_epoch=1", False),
    ],
)
def test_measuring_keeps_its_cost_where_its_files_are_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: Any, change: str, reused: bool
) -> None:
    _, context = measured(tmp_path, *scores)
    context.config = small_config(context.run.uri, *scores, change)
    records = {
        "proxy": StageRecord("done", "proxy"),
        "measure": StageRecord("done", "other", wall_seconds=90, cpu_seconds=165, attempts=2),
    }

    def execute(self: MeasureStage, context: Context, record: StageRecord) -> None:
        record.cpu_seconds += 2

    monkeypatch.setattr(MeasureStage, "execute", execute)
    monkeypatch.setattr(Context, "refresh_cluster", lambda self: None)
    advance(MeasureStage(), context, records)
    assert records["measure"].cpu_seconds == (167 if reused else 2)
    assert (records["measure"].wall_seconds > 89) == reused
    assert context.run.ledger()["measure"].state == "done"
