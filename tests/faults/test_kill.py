"""A run whose driver is killed in every stage ends, when resumed, as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from forked_command import ForkedCommand
from helpers import QUIET, score_files, small_config

import raypipe
from raypipe import storage
from raypipe.config import dump_config
from raypipe.distributed.fork_server import ForkServer
from raypipe.runs.manifests import EpochRecord
from raypipe.runs.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

MOMENTS = {
    "index": lambda run: run.exists(),
    "seed": lambda run: bool(run.done("index")),
    "proxy": lambda run: len(storage.names(run.path("proxy", "epochs"))) >= 4,
    "measure": lambda run: any(
        name.startswith("gradients-") for name in storage.names(run.path("measured"))
    ),
    "embed": lambda run: len(run.done("embeddings")) >= 2,
    "extrapolate": lambda run: len(run.done("scores")) >= 1,
}
"""By stage: a condition that holds once the stage has started and before it is finished."""


Start = Callable[[bool], ForkedCommand]


@pytest.fixture
def start(cluster: str, tmp_path: Path) -> Iterator[Start]:
    """Start a driver that joins the cluster with the configuration in `tmp_path`.

    Whether its workers are forked: they start 2 s sooner each, and the server takes 4 s to start.
    """
    with contextlib.ExitStack() as stack:

        def driver(forks: bool) -> ForkedCommand:
            variables = {"RAY_ADDRESS": cluster}
            if forks:
                server = ForkServer([])
                stack.callback(server.close)
                job = {"runtime_env": {"py_executable": server.python()}}
                variables["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(job)
            command = ["run", "config.yaml", "--until", "extrapolate"]
            return ForkedCommand(command, tmp_path, tmp_path / "printed.txt", variables)

        yield driver


def _kill_training_worker(run: Run, going_on: Callable[[], bool], name: str) -> bool:
    """Kill a training worker during an epoch after the first.

    Only workers of this test's cluster, which are children of this process, are killed.
    """
    while going_on():
        if storage.names(run.path("proxy", "epochs")):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if name in " ".join(process.cmdline()):
                        process.kill()
                        return True
        time.sleep(0.01)
    return False


def test_killed_in_every_stage(
    start: Start,
    finished_scores: dict[str, bytes],
    tmp_path: Path,
) -> None:
    run = Run(str(tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(dump_config(small_config(run.uri)))
    killed = []
    for stage, reached in MOMENTS.items():
        driver = start(stage not in ("index", "seed"))
        if stage == "proxy":  # which also loses a training worker, and continues
            assert _kill_training_worker(
                run, lambda driver=driver: driver.poll() is None, "_train_locally"
            )
        while driver.poll() is None and not reached(run):
            time.sleep(0.005)
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            killed.append(stage)
        assert driver.wait() in (0, -signal.SIGKILL), driver.printed
    assert "proxy" in killed, "the training did not continue after its worker died"
    assert len(killed) >= 4, f"too few kills hit their stage: {killed}"
    last = start(True)
    assert last.wait(timeout=300) == 0, last.printed
    assert score_files(run.uri) == finished_scores
    assert all(record.state == "done" for record in run.ledger().values())


def test_one_of_two_workers_is_replaced_and_then_the_controller(
    cluster: str, tmp_path: Path
) -> None:
    run, found = Run(str(tmp_path / "run")), list[bool]()
    config = small_config(run.uri, "proxy.workers=2", "proxy.epochs=20", "proxy.max_failures=1")
    going_on = threading.Event()

    def kill() -> None:
        for name in ("RayTrainWorker", "TrainController"):
            before = len(storage.names(run.path("proxy", "epochs")))
            while not going_on.is_set() and len(EpochRecord.read_all(run)) == before > 0:
                time.sleep(0.01)
            found.append(_kill_training_worker(run, lambda: not going_on.is_set(), name))

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        raypipe.run(config, until="proxy", progress=QUIET)
    finally:
        going_on.set()
        killer.join()
    assert found == [True, True]
    assert [epoch.epoch for epoch in EpochRecord.read_all(run)] == list(range(20))
    assert run.ledger()["proxy"].detail["workers"] == 2
