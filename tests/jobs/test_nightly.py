"""jobs/nightly.py: exit codes, the last line, a killed night on Ray, and fresh measurements."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from helpers import QUIET, score_files, small_config
from nights import Place, finished_place, in_process

from raypipe import storage
from raypipe.config import Config, dump_config
from raypipe.errors import RunError
from raypipe.nightly import Night
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.runs.snapshots import load_snapshot

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "jobs" / "nightly.py"
DIGITS = str(ROOT / "jobs" / "configs" / "digits.yaml")


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    spec = importlib.util.spec_from_file_location("jobs_nightly", ENTRY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("advice", "refused", "code"),
    [([], "", 0), (["growth"], "", 4), ([], "no", 3), (["growth"], "no", 3)],
)
def test_exit_codes_and_the_last_line(
    entry: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    advice: list[str],
    refused: str,
    code: int,
) -> None:
    def run_night(config: Config) -> Night:
        print("progress")
        drift = {"tonight": {"auc": 0.5}}
        found = {
            "files": {"new": 1},
            "samples": {"new": 5},
            "drift": drift,
            "fidelity": {"spearman": 0.4},
        }
        return Night(config.run, "2026-11-22T020000Z", True, found, advice, refused)

    monkeypatch.setattr("raypipe.nightly.run_night", run_night)
    assert entry.main(["--config", DIGITS, "--set", "run=/tmp/somewhere"]) == code
    arguments = ["--config", DIGITS, "--refresh-exit-code", "0"]
    assert entry.main(arguments) == (0 if code == 4 else code)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["refresh"] == advice
    assert entry.main(["--config", DIGITS, "--set", "run=/tmp/somewhere"]) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "run": "/tmp/somewhere",
        "snapshot": "2026-11-22T020000Z",
        "made": True,
        "files": {"new": 1},
        "samples": {"new": 5},
        "auc": {"tonight": 0.5},
        "spearman": 0.4,
        "refresh": advice,
        "expired": 0,
    }


def test_failures_and_bad_usage(
    entry: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def run_night(config: Config) -> Night:
        raise RunError("in use")

    assert entry.main(["--config", DIGITS, "--set", f"run={tmp_path / 'none'}"]) == 1
    assert "no run here" in capsys.readouterr().err
    assert entry.main(["--config", DIGITS, "--set", "nightly.audit=-1"]) == 2
    assert "nightly.audit: -1 is not allowed" in capsys.readouterr().err
    monkeypatch.setattr("raypipe.nightly.run_night", run_night)
    assert entry.main(["--config", DIGITS]) == 1 and capsys.readouterr().err == "raypipe: in use\n"


@pytest.mark.ray
def test_more_samples_are_measured_as_those_of_the_run_were(finished: str) -> None:
    """Measure the run's own audit set again, as a fresh audit does: MoSo, EL2N, GraNd and loss."""
    from raypipe.distributed.context import Context
    from raypipe.runs.manifests import SeedManifest
    from raypipe.stages.measure.extra_samples import measure_extra_shard

    run = Run(finished)
    (shard,) = SeedManifest.read(run).audit_shards
    storage.write_bytes(
        run.path("seed", "extra-x.parquet"),
        storage.read_bytes(run.path("seed", f"{shard}.parquet")),
    )
    before = {file.path for file in storage.listing(run.path("measured"))}
    try:
        found = measure_extra_shard(
            Context(small_config(finished), run, QUIET), StageRecord(), "extra-x"
        )
    finally:
        storage.delete(run.path("seed", "extra-x.parquet"))
    expected = storage.read_table(run.path("measured/audit", f"{shard}.parquet"))
    assert found.select(expected.column_names).equals(
        expected.replace_schema_metadata(found.schema.metadata)
    )
    assert {file.path for file in storage.listing(run.path("measured"))} == before


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A finished run before a night with a new file, a changed file and a removed file."""
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        place = finished_place(tmp_path / "place")
        place.night(0)
    place.add(4)
    place.add(0, rows=100)
    place.remove(3)
    return place


def _start(address: str, config: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, str(ENTRY), "--config", str(config)],
        env=environment,
        start_new_session=True,
        **pipes,
    )


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_night_through_ray_that_is_killed_goes_on_to_what_one_process_makes(
    cluster: str, place: Place, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        alone = place.copy(tmp_path / "alone")
        expected = alone.night(1)
    config, run = tmp_path / "config.yaml", place.run
    config.write_text(dump_config(place.config()))
    before = run.done("embeddings")
    first = _start(cluster, config)
    while first.poll() is None and not run.done("embeddings") - before:
        time.sleep(0.005)
    killed = first.poll() is None
    if killed:
        os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert killed
    second = _start(cluster, config)
    out, errors = second.communicate(timeout=300)
    assert second.returncode == expected.exit_code == 0, errors
    told = json.loads(out.splitlines()[-1])
    assert (told["made"], told["files"]) == (True, {"new": 1, "changed": 1, "removed": 1})
    assert score_files(run.uri) == score_files(alone.run.uri)
    found = load_snapshot(run, told["snapshot"])
    wanted = load_snapshot(alone.run, expected.snapshot)
    for kind in ("scores", "keep"):
        assert [entry["hash"] for entry in found[kind]] == [entry["hash"] for entry in wanted[kind]]
    assert found["drift"] == wanted["drift"] and found["samples"] == wanted["samples"]
    assert found["fidelity"]["spearman"] == pytest.approx(wanted["fidelity"]["spearman"], abs=0.01)
