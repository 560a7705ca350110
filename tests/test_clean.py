"""`raypipe clean`: what takes room in a finished run, and what can go."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import small_config
from test_intermediate import AT_CHECKPOINTS, FROM_EMBEDDINGS, trained

from raypipe import storage
from raypipe.cli import cli
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run


def run_of(folder: Path, *settings: str, state: str = "done") -> Run:
    config = small_config(f"{folder}/run", *settings)
    run = Run(config.run)
    run.write_config(config)
    trained(run, config)
    storage.write_bytes(run.path("scores/a.parquet"), bytes(5000))
    run.write_ledger({"proxy": StageRecord("done"), "extrapolate": StageRecord(state)})
    return run


def cleaned(run: Run, *options: str) -> str:
    result = CliRunner().invoke(cli, ["clean", run.uri, *options])
    assert result.exit_code == 0, result.output
    return result.output


def files_of(run: Run) -> set[str]:
    return {file.path for file in storage.walk(run.uri)}


def test_nothing_goes_unless_it_is_asked_for(tmp_path: Path) -> None:
    run = run_of(tmp_path, *FROM_EMBEDDINGS)
    before = files_of(run)
    text = cleaned(run)
    assert "can go      360 B of checkpoints and trajectory" in text and "--yes" in text
    assert text.index("scores ") < text.index("proxy "), "the largest folder first"
    assert files_of(run) == before and not run.ledger()["proxy"].detail
    assert "removed     360 B" in cleaned(run, "--yes")
    gone = before - files_of(run)
    assert len(gone) == 9 and all("epoch-0000" in name or "trajectory" in name for name in gone)
    assert run.ledger()["proxy"].detail["removed"] == ["checkpoints", "trajectory"]
    assert "can go      nothing" in cleaned(run, "--yes")


def test_what_a_score_is_measured_from_stays(tmp_path: Path) -> None:
    run = run_of(tmp_path, *AT_CHECKPOINTS)
    assert "can go      60 B of trajectory" in cleaned(run)


def test_the_proxy_of_a_rehearsal_can_go(tmp_path: Path) -> None:
    scores = ("proxy.parts=3", "proxy.cross_fit=false", "measure.scores=[moso, aum]")
    run = run_of(tmp_path, *scores)
    assert "can go      nothing" in cleaned(run)
    storage.write_bytes(run.path("rehearsal/proxy/checkpoints/x.safetensors"), bytes(1000))
    assert "can go      1.0 KiB of proxy of the rehearsal, from which" in cleaned(run)


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_run_that_is_not_finished_is_left_alone(tmp_path: Path, state: str) -> None:
    run = run_of(tmp_path, *FROM_EMBEDDINGS, state=state)
    before = files_of(run)
    result = CliRunner().invoke(cli, ["clean", run.uri, "--yes"])
    assert result.exit_code == 1 and "not finished (extrapolate)" in str(result.exception)
    assert files_of(run) == before
