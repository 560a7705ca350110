"""A driver killed with SIGKILL in every stage leaves a run that ends, when started again, as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import QUIET, score_files, small_config

import raypipe
from raypipe import storage
from raypipe.config import dump_config
from raypipe.rundir import Run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

MOMENTS = {
    "index": lambda run: run.exists(),
    "seed": lambda run: bool(run.done("index")),
    "proxy": lambda run: len(storage.names(run.path("proxy", "epochs"))) >= 2,
    "measure": lambda run: bool(storage.names(run.path("measured", "gradients"))),
    "embed": lambda run: len(run.done("embeddings")) >= 2,
    "extrapolate": lambda run: len(run.done("scores")) >= 1,
}
"""By stage: something that is there when the stage is on its way and not finished."""


def _driver(address: str, config: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RAY_ADDRESS": address}
    command = [sys.executable, "-m", "raypipe.cli", "run", str(config), "--until", "extrapolate"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def test_killed_in_every_stage(cluster: str, finished_scores: dict[str, bytes], tmp_path: Path) -> None:
    run, config = Run(str(tmp_path / "run")), tmp_path / "config.yaml"
    config.write_text(dump_config(small_config(run.uri)))
    killed = []
    for stage, reached in MOMENTS.items():
        driver = _driver(cluster, config)
        while driver.poll() is None and not reached(run):
            time.sleep(0.005)
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            killed.append(stage)
        _, errors = driver.communicate()
        assert driver.returncode in (0, -signal.SIGKILL), errors.decode()
    assert len(killed) >= 4, f"too few kills hit their stage: {killed}"
    last = _driver(cluster, config)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors.decode()
    assert score_files(run.uri) == finished_scores
    assert all(record.state == "done" for record in run.ledger().values())


def test_a_training_worker_that_dies_is_replaced(cluster: str, finished_scores: dict[str, bytes], tmp_path: Path) -> None:
    import threading

    import psutil

    run = Run(str(tmp_path / "run"))
    raypipe.run(small_config(run.uri), until="seed", progress=QUIET)
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if len(storage.names(run.path("proxy", "epochs"))) >= 1:
                # the cluster is this process's child, so no other's workers are met
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    raypipe.run(small_config(run.uri), until="extrapolate", progress=QUIET)
    thread.join()
    assert killed, "no training worker was found to kill"
    assert score_files(run.uri) == finished_scores
