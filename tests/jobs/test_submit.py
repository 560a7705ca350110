"""`ray job submit`, from an uploaded working directory to scores, on a separate local head."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from helpers import not_ended
from local_nodes import free_ports, ray_command

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
MARK = "0.0.0+uploaded"
BEHIND = [
    ".env",
    "key.pem",
    ".git/config",
    ".venv/bin/python",
    "data/a.parquet",
    "runs/old/run.json",
    "tests/test_x.py",
    "docs/a.png",
]
QUICK = [
    "source.limit=300",
    "source.fragment_samples=100",
    "seed.fraction=0.4",
    "proxy.epochs=2",
    "proxy.checkpoints=2",
]
QUICK += ["measure.max_actors=1", "embed.max_actors=1", "extrapolate.method=knn-published"]
QUICK += ["trust.min_spearman=-1", "trust.min_accuracy_over_chance=-1", "report.images=4"]


NETWORK = """
from torch import nn

def build(classes, image_size, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2), nn.BatchNorm2d(16), nn.GELU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes),
    )
"""
"""A network in a file of the working directory."""


@dataclass
class Head:
    """A running head: where its job server is, its token, and the folder Ray keeps its files in."""

    address: str
    token: str
    folder: Path
    environment: dict[str, str]

    def client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head with two CPUs and its own ports, folder, home and token.

    Only its own processes are ended afterwards.
    """
    with tempfile.TemporaryDirectory(
        prefix="raypipe-", dir="/tmp", ignore_cleanup_errors=True
    ) as name:  # socket paths are short
        folder = Path(name)
        (folder / "home").mkdir()
        ports = free_ports(9)
        # The head's PATH decides which `python` an entrypoint is.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("RAY_") and key != "PYTHONPATH"
        }
        # beyond that, only what the guide says
        environment |= {"PATH": path, "HOME": str(folder / "home"), **_documented_variables()}
        made = ray_command(*_documented("get-auth-token"))
        token = subprocess.run(
            made, env=environment, check=True, capture_output=True, text=True
        ).stdout
        assert (folder / "home" / ".ray" / "auth_token").read_text() == token
        options = dict(zip(_PORT_OPTIONS, ports, strict=True))
        command = ray_command(
            "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", "--num-gpus=0"
        )
        command += [
            "--node-ip-address=127.0.0.1",
            "--object-store-memory=200000000",
            f"--temp-dir={folder / 'ray'}",
        ]
        command += [
            "--min-worker-port=0",
            "--max-worker-port=0",
            *(f"--{option}={port}" for option, port in options.items()),
        ]
        with open(folder / "head.log", "wb") as log:
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
            try:
                started = Head(
                    f"http://127.0.0.1:{options['dashboard-port']}", token, folder, environment
                )
                _wait_until_ready(started, process)
                yield started
            finally:
                _end(process, folder)


def _documented_commands() -> list[str]:
    """Commands of the section on the token in the guide."""
    page = (ROOT / "docs" / "guides" / "cluster.md").read_text()
    block = page.partition("### Token")[2].split("```")[1]
    lines = block.replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def _documented_variables() -> dict[str, str]:
    """Environment variables that the guide exports."""
    exports = [line[7:] for line in _documented_commands() if line.startswith("export ")]
    return dict(pair.split("=", 1) for line in exports for pair in line.split())


def _documented(command: str) -> list[str]:
    """Arguments of one `ray` command of the guide, without what goes to another file."""
    (line,) = (line for line in _documented_commands() if line.startswith(f"ray {command}"))
    return shlex.split(line.partition(" >")[0])[1:]


_PORT_OPTIONS = (
    "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
    "runtime-env-agent-port", "metrics-export-port", "node-manager-port", "object-manager-port",
)  # fmt: skip


def _wait_until_ready(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            head.client().list_jobs()
            return
        except (ConnectionError, RuntimeError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(
                    f"the head did not start: {error}\n{(head.folder / 'head.log').read_text()[-3000:]}"
                )
            time.sleep(0.3)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the head and processes whose command names its folder, with their children, only."""
    roots = []
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if other.pid == process.pid or any(str(folder) in part for part in other.cmdline()):
                roots.append(other)
    mine = {root.pid: root for root in roots}
    for root in roots:
        with contextlib.suppress(psutil.Error):
            mine |= {child.pid: child for child in root.children(recursive=True)}
    for each in mine.values():
        with contextlib.suppress(psutil.Error):
            each.kill()
    process.wait(20)
    not_ended(list(mine.values()), within_s=10)


@pytest.fixture(scope="module")
def checkout(head: Head) -> Path:
    """A copy of what a job needs, with a different version, and with files that must stay behind."""
    folder = head.folder / "checkout"
    for name in ("raypipe", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    package = folder / "raypipe" / "_version.py"
    text, count = re.subn(
        r'(?m)^__version__ = ".*"$', f'__version__ = "{MARK}"', package.read_text()
    )
    assert count == 1
    package.write_text(text)
    (folder / "own_network.py").write_text(NETWORK)
    for name in BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays behind")
    return folder


@dataclass
class Finished:
    """A job that has ended."""

    info: Any
    log: list[str]
    run: Path


def _entrypoint(*settings: str) -> list[str]:
    return [
        "python",
        "jobs/run.py",
        "--config",
        "jobs/configs/digits.yaml",
        *(f"--set={setting}" for setting in settings),
    ]


def _finish(head: Head, job: str, run: Path, seconds: float = 400) -> Finished:
    client, deadline = head.client(), time.monotonic() + seconds
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            pytest.fail(
                f"the job did not end in {seconds:.0f} s:\n{client.get_job_logs(job)[-3000:]}"
            )
        time.sleep(0.5)
    return Finished(client.get_job_info(job), client.get_job_logs(job).splitlines(), run)


@pytest.fixture(scope="module")
def digits(head: Head, checkout: Path) -> Finished:
    """The digits configuration, cut down, submitted with the command of the guide.

    Its network is in a file that the job uploads.
    """
    run = head.folder / "runs" / "digits"
    arguments = _documented("job submit")
    own, entrypoint = arguments[: arguments.index("--")], arguments[arguments.index("--") :]
    assert entrypoint[1:5] == _entrypoint()
    own[own.index("--address") + 1] = head.address
    settings = (f"run={run}", "proxy.model=own_network:build", *QUICK)
    command = ray_command(*own, "--submission-id=digits", "--", *_entrypoint(*settings))
    subprocess.run(command, env=head.environment, cwd=checkout, capture_output=True, timeout=400)
    return _finish(head, "digits", run)


def test_without_the_mode_a_job_is_refused_with_the_words_of_the_guide(
    head: Head, checkout: Path
) -> None:
    environment = {key: value for key, value in head.environment.items() if key != "RAY_AUTH_MODE"}
    command = ray_command("job", "submit", "--address", head.address, "--", "python", "-V")
    sent = subprocess.run(
        command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=120
    )
    words = "Authentication required: Unauthorized: Missing authentication token"
    assert sent.returncode == 1 and words in sent.stdout + sent.stderr
    assert words in (ROOT / "docs" / "guides" / "cluster.md").read_text()


def test_job_succeeds_and_ends_with_its_summary(digits: Finished) -> None:
    assert digits.info.status == "SUCCEEDED", "\n".join(digits.log[-40:])
    assert digits.info.driver_exit_code == 0
    assert json.loads(digits.log[-1])["run"] == str(digits.run)


def test_job_writes_a_score_for_every_sample(digits: Finished) -> None:
    assert digits.info.status == "SUCCEEDED", "\n".join(digits.log[-40:])
    rows = [
        row
        for file in sorted((digits.run / "scores").glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    rejects = sum(
        pq.read_metadata(file).num_rows for file in (digits.run / "rejects").glob("*.parquet")
    )
    assert len(rows) + rejects == 300 and len({row["sample_id"] for row in rows}) == len(rows)
    proxy = json.loads((digits.run / "proxy" / "proxy.json").read_text())
    assert proxy["model"] == "own_network:build"
    assert all(row["measured"] for row in rows)  # by linear probes on the embeddings
    assert list((digits.run / "keep").iterdir()) and (digits.run / "report" / "index.html").exists()


def test_job_runs_the_uploaded_package_without_secrets_data_or_results(
    head: Head, digits: Finished
) -> None:
    assert digits.info.status == "SUCCEEDED", "\n".join(digits.log[-40:])
    assert json.loads((digits.run / "run.json").read_text())["raypipe"] == MARK
    (uploaded,) = (
        head.folder / "ray" / "session_latest" / "runtime_resources" / "working_dir_files"
    ).glob("_ray_pkg_*/")
    names = {str(path.relative_to(uploaded)) for path in uploaded.rglob("*") if path.is_file()}
    assert {"jobs/run.py", "jobs/configs/digits.yaml", "raypipe/stages/embed/stage.py"} <= names
    assert not names & set(BEHIND)


def test_bad_setting_through_the_command_line_fails_with_code_2(head: Head, checkout: Path) -> None:
    run = head.folder / "runs" / "bad"
    command = ray_command(
        "job",
        "submit",
        "--address",
        head.address,
        "--working-dir",
        str(checkout),
        "--submission-id",
        "bad-setting",
    )
    command += ["--", *_entrypoint(f"run={run}", "proxy.epoch=3")]
    sent = subprocess.run(
        command, env=head.environment, capture_output=True, text=True, timeout=120
    )
    assert sent.returncode == 1, sent.stdout + sent.stderr
    finished = _finish(head, "bad-setting", run)
    assert finished.info.status == "FAILED"
    assert finished.info.driver_exit_code == 2
    assert any(
        "proxy.epoch: unknown setting; did you mean 'epochs'?" in line for line in finished.log
    )
    assert not any("Traceback" in line for line in finished.log)
    assert "did you mean 'epochs'" in sent.stdout
    assert not run.exists()
