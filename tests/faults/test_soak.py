"""How `benchmarks/soak.py` compares runs. The kills themselves are in the benchmark."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raypipe import storage
from raypipe.config import parse_config
from raypipe.runs.layout import STAGE_FOLDERS


@pytest.fixture
def soak_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("soak_runs")


def _shard(run: Path, name: str, ids: list[str]) -> None:
    storage.write_table(
        f"{run}/{name}.parquet",
        pa.table({"sample_id": ids, "score": [float(len(name)) for name in ids]}),
    )


def test_what_is_lost_doubled_different_or_left_is_found(soak_runs: Any, tmp_path: Path) -> None:
    truth, run = tmp_path / "truth", tmp_path / "run"
    _shard(truth, "scores/one", ["a", "b"])
    _shard(truth, "scores/two", ["c", "d"])
    _shard(truth, "rejects/one", ["e"])
    _shard(truth, "keep/keep-0.50", ["a", "c"])
    shutil.copytree(truth, run)
    assert soak_runs.compare(truth, run) == soak_runs.Found(0, 0, [], [])
    (run / "logs").mkdir()
    (run / "logs" / "of-its-own.log").write_text("")
    (run / "scores" / ".two.parquet.0123").write_text("what a killed writer leaves")
    assert soak_runs.compare(truth, run) == soak_runs.Found(0, 0, [], ["scores/.two.parquet.0123"])
    _shard(run, "scores/two", ["c"])
    assert soak_runs.compare(truth, run).lost == 1
    _shard(run, "scores/two", ["c", "d", "e"])
    assert soak_runs.compare(truth, run).doubled == 1
    _shard(run, "scores/two", ["c", "d"])
    _shard(run, "keep/keep-0.50", ["a", "d"])
    _shard(run, "scores/three", [])
    found = soak_runs.compare(truth, run)
    assert (found.lost, found.doubled, found.differ) == (
        0,
        0,
        ["keep/keep-0.50.parquet", "scores/three.parquet"],
    )


def test_the_run_has_every_stage(soak_runs: Any, tmp_path: Path) -> None:
    config = parse_config(soak_runs.configuration(tmp_path, tmp_path / "run"))
    assert config.rehearses and config.measure.at_checkpoints and set(STAGE_FOLDERS) >= {"rehearse"}
    assert set(config.measure.scores) - set(config.measure.at_checkpoints), (
        "no score is from the trajectory"
    )
