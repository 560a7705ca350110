"""Runs that an older version wrote still work; `data/README.md` says how they were made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET

import raypipe
from raypipe import cli
from raypipe.errors import ConfigError

OLD = Path(__file__).parent / "data" / "run-0.1.0"
SAMPLES, MEASURED = 240, 149
DRIVER_FILES = ("config.yaml", "driver.json", "logs/")
"""Files that every driver writes, also one that has nothing to do."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the old run that a test can change."""
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def _main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def _resume(run: Path) -> None:
    """Run the configuration that the run has stored, in the folder where the copy is."""
    raypipe.run(str(run / "config.yaml"), overrides=[f"run={run}"], progress=QUIET)


def _files(run: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file that a stage wrote."""
    files = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    return {
        name: (path.read_bytes(), path.stat().st_mtime_ns)
        for name, path in files.items()
        if not name.startswith(DRIVER_FILES)
    }


def _ledger(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def _change_ledger(run: Path, **changes: dict[str, Any] | None) -> None:
    """Update records of stages; None removes one."""
    ledger = _ledger(run)
    for stage, change in changes.items():
        record = ledger["stages"].pop(stage)
        if change is not None:
            ledger["stages"][stage] = {**record, **change}
    (run / "run.json").write_text(json.dumps(ledger))


def _keep_list(run: Path, keep: float) -> pa.Table:
    return pq.read_table(run / "keep" / f"keep-{keep:.2f}.parquet")


def test_status_shows_every_stage_as_done(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _main(capsys, "status", str(run))
    assert code == 0
    states = {line.split()[0]: line.split()[1:3] for line in out.splitlines()}
    for stage in ("index", "embed", "extrapolate", "select", "report"):
        assert states[stage] == ["done", str(SAMPLES)]
    assert states["measure"] == ["done", str(MEASURED)]


def test_the_configuration_can_be_read(run: Path) -> None:
    config = raypipe.Run(str(run)).config()
    assert (config.source.uri, config.source.limit) == ("digits://", SAMPLES)
    assert (config.score, config.extrapolate.method) == ("moso", "gnn")


def test_the_scores_can_be_loaded(run: Path) -> None:
    scores = raypipe.load_scores(str(run))
    names = ["sample_id", "label", "score", "lower", "upper", "measured"]
    assert scores.column_names == names and len(scores) == SAMPLES
    assert len(set(scores["sample_id"].to_pylist())) == SAMPLES
    assert sum(scores["measured"].to_pylist()) == MEASURED
    score, lower, upper = (scores[name].to_numpy() for name in names[2:5])
    assert np.isfinite(score).all() and (lower <= score).all() and (score <= upper).all()


def test_keep_lists_can_be_read_and_cut(run: Path) -> None:
    before = {keep: _keep_list(run, keep) for keep in (0.3, 0.7)}
    assert raypipe.select(str(run), keep=0.5) == {"keep-0.50.parquet": SAMPLES // 2}
    assert len(_keep_list(run, 0.5)) == SAMPLES // 2
    for keep, table in before.items():  # the scores are the same, so the old lists stay
        assert _keep_list(run, keep).equals(table) and len(table) == round(keep * SAMPLES)
        assert len(raypipe.KeepList(str(run), keep=keep)) == len(table)
    raypipe.select(str(run))
    for keep, table in before.items():
        assert _keep_list(run, keep).equals(table, check_metadata=True)


def test_the_report_can_be_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((run / "report" / "summary.json").read_text())
    shutil.rmtree(run / "report")
    code, out, _ = _main(capsys, "report", str(run))
    assert code == 0 and out.split() == [str(run / "report" / "index.html")]
    assert "</html>" in (run / "report" / "index.html").read_text()
    after = json.loads((run / "report" / "summary.json").read_text())
    assert after.keys() == before.keys() | {"code", "high_is_hard", "pilot", "sets", "stability"}
    # the wording of a sentence can change, its figures cannot
    old, new = (summary["fidelity"].pop("sentence") for summary in (before, after))
    shown = [set(re.findall(r"\d+(?:\.\d+)?", sentence)) for sentence in (old, new)]
    assert shown[0] <= shown[1]
    # nothing is called strong whose stability is not known
    assert [summary["fidelity"].pop("verdict") for summary in (before, after)] == ["strong", "good"]
    assert after["fidelity"] == before["fidelity"]


def test_code_that_a_configuration_names_is_imported_by_a_run_only(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    Path("marks.py").write_text("open('mark', 'w').close()\ndef network(*_): ...\n")
    for name, old in (("config.yaml", "model: small"), ("proxy/proxy.json", '"model": "small"')):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace("small", "marks:network", 1))
    for command in (
        ["status", str(run)],
        ["select", str(run), "--keep", "0.5"],
        ["report", str(run)],
        [
            "export",
            str(run),
            "--format",
            "indices",
            "--keep",
            "0.5",
            "--to",
            "kept.json",
        ],
        ["inspect", "--config", str(run / "config.yaml")],
    ):
        code, _, err = _main(capsys, *command)
        assert code == 0, err
        assert not Path("mark").exists(), command[0]
    with pytest.raises(ConfigError, match="marks:network"):
        _resume(run)
    assert Path("mark").exists()


def test_a_finished_run_is_resumed_without_doing_anything(run: Path) -> None:
    before = _files(run)
    assert "run.json" in before and "extrapolator/model.safetensors" in before
    _resume(run)
    assert _files(run) == before


@pytest.mark.ray
@pytest.mark.parametrize("fitted", [True, False], ids=["from the extrapolator", "from embeddings"])
def test_scores_that_were_deleted_come_back(cluster: str, run: Path, fitted: bool) -> None:
    """Without its record a stage starts over, so that the fit is repeated from the old files."""
    scores, before, ledger = raypipe.load_scores(str(run)), _files(run), _ledger(run)
    for folder in ("scores", "keep", "report"):
        shutil.rmtree(run / folder)
    _change_ledger(run, extrapolate={"state": "running"} if fitted else None)
    _change_ledger(run, select=None, report=None)
    _resume(run)

    # extrapolator.json now has the setting of the audit of extreme predictions
    fit = "extrapolator/extrapolator.json" if fitted else "extrapolator/"
    redone = ("run.json", "scores/", "keep/", "report/", fit)
    after = _files(run)
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert {name for name in changed if not name.startswith(redone)} == set()
    stages = _ledger(run)["stages"]
    assert {record["state"] for record in stages.values()} == {"done"}
    for stage in ("index", "seed", "proxy", "measure", "embed"):
        assert stages[stage] == ledger["stages"][stage]

    again = raypipe.load_scores(str(run))
    for name in ("sample_id", "label", "measured"):
        assert again[name].equals(scores[name])
    for name in ("score", "lower", "upper"):
        old, new = scores[name].to_numpy(), again[name].to_numpy()
        if fitted:  # not equal: another CPU can round differently
            np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6, err_msg=name)
        else:  # a new fit also calibrates its intervals differently
            assert np.corrcoef(new, old)[0, 1] > (0.999 if name == "score" else 0.99), name


@pytest.mark.parametrize("command", ["status", "select", "report", "run"])
def test_a_run_of_another_format_is_refused(
    run: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").write_text(json.dumps({**_ledger(run), "format": 2}))
    before = _files(run)
    config = [str(run / "config.yaml"), "--set", f"run={run}"]
    code, _, err = _main(capsys, command, *(config if command == "run" else [str(run)]))
    assert code == 1 and err.count("\n") == 1
    assert f"{run}: run.json has format 2; this raypipe reads format 1." in err
    assert "Use the version of raypipe that wrote this run, or give another run folder" in err
    assert _files(run) == before
