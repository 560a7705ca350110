"""Threads of workers sleep instead of spinning, and workers get their share of a busy machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from raypipe.distributed.waiting import SPINS, waiting_variables

DRIVER = """
import json, os
import ray
from raypipe.config import ClusterSettings
from raypipe.distributed.cluster import connect
from raypipe.progress import Progress
from raypipe.runs.run import Run

connect(ClusterSettings(), Run("unused"), Progress(quiet=True), verbose=False)

@ray.remote
def seen():
    return os.environ.get("GOMP_SPINCOUNT"), os.nice(0)

print(json.dumps(ray.get(seen.remote())))
"""


def _seen(address: str, **variables: str) -> list[object]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))
    }
    output = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env={**environment, "RAY_ADDRESS": address, **variables},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.ray
def test_workers_of_a_cluster_on_this_machine(cluster: str) -> None:
    import ray

    @ray.remote
    def seen() -> tuple[str | None, int]:
        return os.environ.get("GOMP_SPINCOUNT"), os.nice(0)

    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    assert ray.get(seen.remote()) == (os.environ.get("GOMP_SPINCOUNT"), os.nice(0))


@pytest.mark.ray
def test_workers_of_a_cluster_that_is_joined(cluster: str) -> None:
    assert _seen(cluster)[0] == str(SPINS)


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert waiting_variables() == {"GOMP_SPINCOUNT": str(SPINS)}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert waiting_variables() == {}
