"""One driver at a time: a driver whose lease expired, so that another took over its run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, small_config

from raypipe import pipeline, storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import RunError
from raypipe.runs import lease
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.base import Stage

OTHER = {
    "owner": "other",
    "host": "elsewhere",
    "pid": 7,
    "boot": "",
    "time": 4e9,
    "date": "2099-01-01",
}


class Slow(Stage):
    """A stage during which another driver takes over the run."""

    name = "index"

    def settings(self, config: Config) -> dict[str, Any]:
        return {}

    def complete(self, context: Context, record: StageRecord) -> bool:
        return False

    def execute(self, context: Context, record: StageRecord) -> None:
        Path(context.run.path("driver.json")).write_text(json.dumps(OTHER))
        Path(context.run.path("run.json")).write_bytes(b"of the other")
        time.sleep(30)


def test_a_driver_that_lost_its_lease_stops_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.8)
    monkeypatch.setattr(pipeline, "make_stage", lambda name: Slow())
    run, started = Run(str(tmp_path / "run")), time.monotonic()
    with pytest.raises(RunError, match=r"another one \(process 7 on elsewhere\) took over"):
        pipeline.execute(small_config(run.uri), progress=QUIET)
    assert time.monotonic() - started < 15
    assert storage.read_json(run.path("driver.json")) == OTHER
    assert storage.read_bytes(run.path("run.json")) == b"of the other"


def test_the_ledger_is_not_written_without_the_lease(place: str) -> None:
    run = Run(f"{place}/run")
    with Lease(run):
        run.write_ledger({"index": StageRecord(fingerprint="1")})
        storage.write_bytes(run.path("driver.json"), json.dumps(OTHER).encode())
        with pytest.raises(RunError, match="took over the run"):
            run.write_ledger({})
    assert "index" in run.ledger()
    assert storage.exists(run.path("driver.json")), "the lease of the other stays"


def test_a_lease_that_somebody_deleted_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.4)
    run = Run(str(tmp_path))
    with Lease(run):
        storage.delete(run.path("driver.json"))
        end = time.monotonic() + 10
        while not storage.exists(run.path("driver.json")) and time.monotonic() < end:
            time.sleep(0.05)
        run.write_ledger({})
        with pytest.raises(RunError, match="in use by another driver"), Lease(Run(run.uri)):
            pass
    assert storage.read_json(run.path("driver.json"))["released"] is True
    with Lease(Run(run.uri)):
        pass
