"""A suspended driver whose run was taken over changes nothing when it resumes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config

from raypipe import storage
from raypipe.config import dump_config
from raypipe.errors import RunError, StorageError, TakenOverError
from raypipe.runs import lease
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult
from raypipe.storage import fences

OTHER = json.dumps(
    {"owner": "other", "host": "elsewhere", "pid": 7, "boot": "", "time": 4e9, "date": "2099-01-01"}
).encode()

DRIVER = """
import itertools, sys, time
from raypipe import cli, pipeline, storage
from raypipe.stages.base import Stage

class Endless(Stage):
    name = "index"
    def settings(self, config): return {}
    def complete(self, context, record): return False
    def execute(self, context, record):
        for number in itertools.count():
            uri = context.run.path("index", f"{number % 5}.parquet")
            storage.write_bytes(uri, b"first %d" % number)
            context.run.write_ledger({"index": record})
            context.progress.say(f"written {number}")

pipeline.make_stage = lambda name: Endless()
cli.main(["run", sys.argv[1], "--until", "index"])
"""


def content(run: Run) -> dict[str, tuple[str, bytes]]:
    """Stamp and content of every file of a run. Unfinished files are hidden, and can disappear."""
    return {
        file.path: (file.stamp, storage.read_bytes(run.path(file.path)))
        for file in storage.walk(run.uri)
    }


def silent_for_long(run: Run) -> None:
    """Make the lease look as if it had not been renewed for more than a minute."""
    lease = json.loads(storage.read_bytes(run.path("driver.json")))
    storage.write_bytes(
        run.path("driver.json"), json.dumps({**lease, "time": lease["time"] - 1000}).encode()
    )


def suspend(process: int, folder: str) -> None:
    """Suspend a process while it holds no lock of a folder, which would block the next driver."""
    os.kill(process, signal.SIGSTOP)
    while "://" not in folder:
        file = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            os.kill(process, signal.SIGCONT)
            time.sleep(0.01)
            os.kill(process, signal.SIGSTOP)
        finally:
            os.close(file)


@pytest.mark.parametrize(
    ("where", "finished"), [("local", True), ("s3", False)], ids=["other-finished", "other-at-work"]
)
def test_a_suspended_driver_that_wakes_up_changes_nothing(
    s3: str, tmp_path: Path, where: str, finished: bool
) -> None:
    run = Run(f"{s3}/suspended/run" if where == "s3" else str(tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(dump_config(small_config(run.uri)))
    first = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 120
        while len(storage.names(run.path("index"))) < 5:
            assert first.poll() is None and time.monotonic() < end, first.communicate()[1].decode()
            time.sleep(0.02)
        suspend(first.pid, run.uri)
        with (
            pytest.raises(RunError, match=rf"in use by another driver: process {first.pid} on"),
            Lease(run),
        ):
            pass
        silent_for_long(run)
        with Lease(run):
            run.write_ledger({"index": StageRecord(fingerprint="second")})
            storage.write_bytes(run.path("index", "0.parquet"), b"second")
            if not finished:
                before = content(run)
                outcome = _woken(first)
                assert content(run) == before
        if finished:
            before = content(run)
            outcome = _woken(first)
            assert content(run) == before
    finally:
        first.kill()
        first.communicate()
    code, errors = outcome
    lines = [line for line in errors.splitlines() if line.startswith("raypipe: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in errors, errors
    assert re.search(
        rf"{run.uri}: .*another one \(process {os.getpid()} on .*\) took over the run\. This one stops",
        lines[0],
    )


def _woken(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors.decode()


@pytest.fixture
def unrenewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable renewals during the test: the renewing thread would notice the loss and interrupt."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1e6)


def test_everything_that_changes_a_run_looks_at_the_fence(place: str, unrenewed: None) -> None:
    run = Run(f"{place}/run")
    with Lease(run):
        storage.write_bytes(run.path("there"), b"mine")
        storage.write_bytes(f"{place}/run-2/there", b"mine")
        late = storage.Upload(run.path("late"))
        file = late.__enter__()
        file.write(b"late")
        _write_past_the_fence(run, OTHER)
        for change in (
            lambda: storage.write_bytes(run.path("there"), b"yours"),
            lambda: storage.write_json(run.path("deep", "new.json"), {}),
            lambda: storage.delete(run.path("there")),
            lambda: storage.delete(run.uri),
            lambda: late.__exit__(None, None, None),
            lambda: run.clear("index"),
            lambda: run.write_ledger({}),
        ):
            with pytest.raises(
                TakenOverError, match=r"another one \(process 7 on elsewhere\) took over"
            ):
                change()
        assert storage.read_bytes(run.path("there")) == b"mine"
        assert storage.names(run.uri) <= {"there", "driver.json", "deep"}
        storage.write_bytes(f"{place}/run-2/there", b"of another run")
    assert storage.read_bytes(run.path("driver.json")) == OTHER, (
        "the lease of the other stays as it is"
    )


def _write_past_the_fence(run: Run, lease: bytes) -> None:
    standing = fences.standing()
    fences.put_up({})
    storage.write_bytes(run.path("driver.json"), lease)
    fences.put_up(standing)


def test_a_ledger_on_its_way_to_an_object_store_is_refused_there(
    s3: str, unrenewed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver takes over between the check and the request: only the store can notice."""
    run = Run(f"{s3}/on-its-way/run")
    with Lease(run):
        run.write_ledger({"index": StageRecord(fingerprint="first")})
        exchange = storage.exchange_bytes

        def late(uri: str, old: bytes, new: bytes) -> bool:
            if uri.endswith("run.json"):
                monkeypatch.setattr(storage, "exchange_bytes", exchange)
                _write_past_the_fence(run, OTHER)
                fences.put_up({})  # as if the request had been sent before
                storage.write_bytes(uri, b"of the other")
            return exchange(uri, old, new)

        monkeypatch.setattr(storage, "exchange_bytes", late)
        with pytest.raises(TakenOverError):
            run.write_ledger({"index": StageRecord(fingerprint="late")})
        assert storage.read_bytes(run.path("run.json")) == b"of the other"


def test_a_run_cannot_be_taken_over_in_the_middle_of_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a local disk, a driver suspended between the check and the change still holds the lock."""
    monkeypatch.setattr(fences, "LOCK_SECONDS", 0.2)
    run = Run(str(tmp_path / "run"))
    with Lease(run):
        silent = json.loads(storage.read_bytes(run.path("driver.json")))
        _write_past_the_fence(run, json.dumps({**silent, "time": 0}).encode())
        locked = pytest.raises(StorageError, match="locked by another process")
        with fences.passed(run.path("index", "0.parquet")), locked, Lease(Run(run.uri)):
            pass
        with Lease(Run(run.uri)):
            pass


def test_an_actor_is_made_where_the_fences_of_its_driver_stand(
    tmp_path: Path, unrenewed: None
) -> None:
    from raypipe.distributed.actor_pool import EMPTY, UNIT, _Actor

    run = Run(str(tmp_path / "run"))

    class Writing:
        def __init__(self, to: str) -> None:
            storage.write_bytes(f"{to}/started", b"x")

        def __call__(self, unit: str, batch: dict[str, np.ndarray]) -> UnitResult:
            storage.write_bytes(run.path("batch"), b"x")
            return UnitResult(unit)

    with Lease(run):
        make, standing = fences.fenced(partial(Writing, run.uri)), fences.standing()
        try:
            fences.put_up({})  # as it is in another process
            actor, batch = _Actor(make), {UNIT: np.array(["a"]), EMPTY: np.array([True])}
            assert actor(batch)["unit"] == ["a"] and fences.standing() == standing
            _write_past_the_fence(run, OTHER)
            for action in (lambda: actor(batch), lambda: _Actor(make)):
                with pytest.raises(TakenOverError):
                    action()
        finally:
            fences.put_up(standing)


@pytest.mark.ray
def test_tasks_of_a_driver_that_lost_its_run_write_nothing(
    cluster: str, tmp_path: Path, unrenewed: None
) -> None:
    from raypipe.distributed.tasks import run_tasks

    run, results, uri = Run(str(tmp_path / "run")), [], str(tmp_path / "run")

    def task(name: str) -> dict[str, str]:
        storage.write_bytes(f"{uri}/tasks/{name}", b"x")
        return {"unit": name}

    with Lease(run):
        run_tasks(["a"], task, results.append, num_cpus=0.5)
        _write_past_the_fence(run, OTHER)
        with pytest.raises(
            TakenOverError, match=r"another one \(process 7 on elsewhere\) took over"
        ):
            run_tasks(["b"], task, results.append, num_cpus=0.5)
    assert results == [{"unit": "a"}] and storage.names(run.path("tasks")) == {"a"}
    run_tasks(
        ["c"],
        lambda name: storage.write_bytes(f"{uri}-2/{name}", b"x") or {"unit": name},
        results.append,
        num_cpus=0.5,
    )
    assert storage.names(f"{uri}-2") == {"c"}
