"""jobs/run.py: arguments, exit codes and the last line, without a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import raypipe
from raypipe.config import Config
from raypipe.errors import StageError, TrustError

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / "jobs" / "configs" / "digits.yaml")


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    spec = importlib.util.spec_from_file_location("jobs_run", ROOT / "jobs" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_passes_the_configuration_on_and_ends_with_one_line(
    entry: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Config] = []

    def run(config: Config, **options: Any) -> Any:
        seen.append(config)
        print("progress")
        summary = {
            "counts": {"samples": 298, "measured": 90, "rejects": 2},
            "keep": [{"file": "keep-0.50.parquet", "samples": 149}],
        }
        summary |= {
            "fidelity": {
                "spearman": 0.5,
                "spearman_low": 0.4,
                "spearman_high": 0.6,
                "baselines": {},
            },
            "classes": [],
        }
        return SimpleNamespace(
            uri=config.run, summary=summary | {"cost": {"total": {"wall_seconds": 7.5}}}
        )

    monkeypatch.setitem(raypipe.__dict__, "run", run)
    assert (
        entry.main(["--config", DIGITS, "--set", "proxy.epochs=11", "--set", "run=/tmp/somewhere"])
        == 0
    )
    assert seen[0].proxy.epochs == 11 and seen[0].source.uri == "digits://"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "run": "/tmp/somewhere",
        "samples": 298,
        "measured": 90,
        "rejects": 2,
        "spearman": 0.5,
        "spearman_low": 0.4,
        "spearman_high": 0.6,
        "keep": {"keep-0.50.parquet": 149},
        "wall_seconds": 7.5,
    }


def test_a_failed_run_is_one_line_and_code_1(
    entry: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Config, **options: Any) -> Any:
        raise StageError("embed: 3 of 300 samples are missing")

    monkeypatch.setitem(raypipe.__dict__, "run", run)
    assert entry.main(["--config", DIGITS]) == 1
    assert capsys.readouterr().err == "raypipe: embed: 3 of 300 samples are missing\n"


def test_scores_too_unfaithful_to_prune_by_are_code_3_with_the_summary(
    entry: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def run(config: Config, **options: Any) -> Any:
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "summary.json").write_text('{"counts": {"samples": 5}}')
        raise TrustError("no keep-lists: 0.1")

    monkeypatch.setitem(raypipe.__dict__, "run", run)
    assert entry.main(["--config", DIGITS, "--set", f"run={tmp_path}"]) == 3
    captured = capsys.readouterr()
    assert captured.err == "raypipe: no keep-lists: 0.1\n"
    assert json.loads(captured.out)["samples"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", DIGITS, "--set", "seed.fraction=2"], "seed.fraction: 2 is not allowed"),
        (["--config", DIGITS, "--set", "seed"], "expected section.field=value"),
        (["--config", DIGITS, "--inject-noise", "2"], "source.inject_noise: 2.0 is not allowed"),
        (["--config", "no/such.yaml"], "no/such.yaml: no such file"),
    ],
)
def test_a_bad_configuration_is_named_and_code_2(
    entry: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert entry.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_configuration_it_says_so(
    entry: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        entry.main([])
    assert caught.value.code == 2 and "--config" in capsys.readouterr().err


def test_finds_the_package_beside_it_when_none_is_installed(tmp_path: Path) -> None:
    """Without installed packages, working directory and PYTHONPATH (-I, -S), jobs/run.py still runs."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "run.py").write_bytes((ROOT / "jobs" / "run.py").read_bytes())
    package = tmp_path / "raypipe"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import types\ndef run(config, **options): return types.SimpleNamespace(uri='here', summary={})\n"
    )
    (package / "config.py").write_text("def load_config(path, overrides): return path\n")
    (package / "errors.py").write_text(
        "class RaypipeError(Exception): exit_code = 1\nclass TrustError(RaypipeError): pass\n"
    )
    command = [sys.executable, "-I", "-S", str(tmp_path / "jobs" / "run.py"), "--config", "any"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["run"], done.stderr) == (0, "here", "")
