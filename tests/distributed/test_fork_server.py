"""Workers forked from a process that has imported torch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raypipe.distributed.fork_server import ForkServer

SCRIPT = """
import json, numpy, os, resource, sys
print(json.dumps({
    "torch": "torch" in sys.modules, "ray": "ray" in sys.modules, "arguments": sys.argv,
    "variable": os.environ.get("OF_THE_WORKER"), "folder": os.getcwd(),
    "path": sys.path[0], "main": __name__, "parent": os.getppid(),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "draw": numpy.random.random(),
    "ids": [] if "ray" not in sys.modules else [
        kind.from_random().hex() for kind in vars(sys.modules["ray"]).values()
        if hasattr(kind, "from_random")
    ],
}))
print("to stderr", file=sys.stderr)
sys.exit(3)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(SCRIPT)
    return path


def worker(server: ForkServer, script: Path, job: str = "01") -> tuple[dict[str, Any], str]:
    """Start a worker as Ray does; return what it prints on its two streams."""
    command = f"ulimit -Sn 517; exec {server.python()} {shlex.join([str(script), '--name', 'a b'])}"
    process = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"OF_THE_WORKER": "é", "RAY_JOB_ID": job},
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return json.loads(process.stdout), process.stderr


@linux
def test_a_worker_is_a_fork_with_everything_of_its_own(script: Path) -> None:
    server = ForkServer(["no_such_library"])
    try:
        draws, ids = set(), []
        for _ in range(2):
            output, errors = worker(server, script)
            draws.add(output["draw"])
            ids += output["ids"]
            assert output["files"] == 517
            assert output["torch"], "not imported before the fork"
            assert output["ray"], "not imported before the fork"
            assert output["parent"] == server.process.pid
            assert output["arguments"] == [str(script), "--name", "a b"]
            assert (output["variable"], output["main"]) == ("é", "__main__")
            assert output["folder"] == output["path"] == str(script.parent)
            assert errors == "to stderr\n"
        assert len(draws) == 2, "forks draw the same numbers"
        assert len(set(ids)) == len(ids) >= 10, "forks draw the same ids of Ray"
        assert not worker(server, script, job="02")[0]["ray"], "Ray was imported with another job"
        end = time.monotonic() + 10
        while psutil.Process(server.process.pid).children():
            assert time.monotonic() < end, "workers that ended stay zombies"
            time.sleep(0.1)
    finally:
        server.close()
    assert server.process.returncode == 0


@linux
def test_without_a_server_the_client_becomes_the_worker(script: Path) -> None:
    server = ForkServer([])
    server.process.kill()
    try:
        output, errors = worker(server, script)
    finally:
        server.close()
    assert not output["torch"]
    assert output["parent"] == os.getpid()
    assert output["arguments"] == [str(script), "--name", "a b"]
    assert output["variable"] == "é"
    assert errors == "to stderr\n"


@linux
def test_workers_of_a_local_cluster_are_forks(cluster: str) -> None:
    import ray

    def parent() -> str:
        return " ".join(psutil.Process(os.getppid()).cmdline())

    assert "fork_server.py" in ray.get(ray.remote(parent).remote())
