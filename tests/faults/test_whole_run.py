"""A whole run on an object store that fails 5 % of the requests and lets credentials expire."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_proxy import KINDS, standing_before
from helpers import score_files, small_config

from raypipe import storage
from raypipe.config import dump_config
from raypipe.runs.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]


def test_scores_are_those_of_an_undisturbed_run(
    cluster: str, s3_server: str, s3: str, finished_scores: dict[str, bytes], tmp_path: Path
) -> None:
    run, config = Run(f"{s3}/disturbed/run"), tmp_path / "config.yaml"
    config.write_text(dump_config(small_config(run.uri)))
    with standing_before(s3_server, rate=0.05, seed=1) as proxy:
        disturbed = {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 2}}),
        }
        job = {
            "RAY_ADDRESS": cluster,
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": disturbed}}),
        }

        def driver() -> subprocess.Popen[bytes]:
            command = [
                sys.executable,
                "-m",
                "raypipe.cli",
                "run",
                str(config),
                "--until",
                "extrapolate",
            ]
            return subprocess.Popen(
                command, env={**os.environ, **disturbed, **job}, stderr=subprocess.PIPE
            )

        first = driver()
        while first.poll() is None and not storage.names(run.path("embeddings")):
            time.sleep(0.1)
        proxy.every = "expired"
        _, errors = first.communicate(timeout=200)
        told = [line for line in errors.decode().splitlines() if line.startswith("raypipe: ")]
        assert first.returncode == 1 and len(told) == 1 and "Traceback" not in errors.decode(), (
            errors.decode()
        )
        assert run.uri in told[0] and "Renew" in told[0] and "expired" in told[0]
        proxy.every = ""
        second = driver()
        _, errors = second.communicate(timeout=300)
        assert second.returncode == 0, errors.decode()
    assert score_files(run.uri) == finished_scores
    assert all(record.state == "done" for record in run.ledger().values())
    assert (
        set(proxy.found) >= set(KINDS)
        and sum(proxy.found[kind] for kind in KINDS) > 0.03 * proxy.asked
    )
