"""A cluster that raypipe starts on this machine: its processes, and how it starts a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from raypipe.distributed import local_cluster, setup_worker
from raypipe.distributed.local_cluster import TESTED
from raypipe.distributed.setup_worker import own_python

CONTEXT = {"command_prefix": [], "env_vars": {}, "py_executable": "fast -I 'a b'", "java_jars": []}


def arguments(language: str = "PYTHON", **changes: object) -> list[str]:
    context = json.dumps({**CONTEXT, **changes})
    return ["worker.py", "--name=a b", f"--language={language}", setup_worker.CONTEXT + context]


def test_a_worker_with_a_python_of_its_own_is_started_at_once() -> None:
    assert own_python(arguments()) == ("fast -I 'a b'", ["worker.py", "--name=a b"])


@pytest.mark.parametrize(
    "more",
    [
        arguments(env_vars={"A": "1"}),
        arguments(command_prefix=["cd /tmp &&"]),
        arguments(py_executable=None),
        arguments(language="JAVA"),
        arguments(of_a_later_ray=1),
        arguments()[:-1],
    ],
)
def test_every_other_worker_is_left_to_ray(more: list[str], tmp_path: Path) -> None:
    assert own_python(more) is None
    (tmp_path / "setup_worker.py").write_text("import sys; print(sys.argv[1:])")
    more = [str(tmp_path / more[0]), *more[1:]]
    command = [sys.executable, setup_worker.__file__, *more]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"{more}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_only_the_processes_that_a_run_needs_are_started(cluster: str) -> None:
    import ray

    assert ray.__version__.startswith(TESTED), "try the test with this version, and add it"
    started = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    for left_out in ("monitor.py", "log_monitor.py", "dashboard/dashboard.py"):
        assert not [command for command in started if left_out in command]
    assert [command for command in started if "raylet" in command]
    assert not ray._private.worker.global_worker.node.address_info["webui_url"]


def test_other_versions_of_ray_start_as_ray_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    started: list[dict[str, object]] = []

    def private(log_monitor: bool) -> None:
        raise AssertionError("private parts of an unknown version")

    monkeypatch.setattr(ray, "__version__", "2.61.0")
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(local_cluster, "_few_processes", private)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # not changed for other tests
    local_cluster.start_local({"num_cpus": 2}, False, ())
    assert started == [{"address": "local", "include_dashboard": False, "num_cpus": 2}]


def test_a_driver_that_joins_does_not_wait_for_an_autoscaler(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raypipe.distributed import cluster as module

    def never() -> set[str]:
        raise AssertionError("the cluster has no autoscaler to report")

    monkeypatch.setattr(module, "_reported_types", never)
    assert not module.current_cluster(joined=True).can_grow


def test_who_asks_for_the_dashboard_is_refused_at_once(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import utils
    from ray.dashboard.utils import ray_address_to_api_server_url

    def waited(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s for the address of a dashboard")

    monkeypatch.setattr(utils.time, "sleep", waited)
    assert ray_address_to_api_server_url(cluster) == "http://127.0.0.1:1"
