"""The command line: messages, exit codes, and fast start-up of commands that run nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import raypipe
from raypipe import cli
from raypipe.errors import RaypipeError, RunError

TABLES = ["extrapolate", "--embeddings", "e", "--scores", "s", "--out", "o"]


def _main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_help_names_every_verb(capsys) -> None:
    code, out, _ = _main(capsys, "--help")
    assert code == 0
    for verb in (
        "run",
        "demo",
        "init",
        "inspect",
        "status",
        "extrapolate",
        "select",
        "export",
        "report",
    ):
        assert f"  {verb} " in out


def test_every_help_ends_with_an_example_and_exit_codes(capsys) -> None:
    for name in ("", *cli.cli.commands):
        code, out, _ = _main(capsys, *([name] if name else []), "--help")
        assert code == 0
        _, example, ending = out.partition("Example:")
        assert example and f"raypipe {name}".strip() in ending.splitlines()[1]
        assert "Exit codes:" in ending and "0  done" in ending
        assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "No such command"),
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["demo", "--set", "proxy.epochs=-1"], "proxy.epochs: -1 is not allowed"),
        (["demo", "--set", "proxy.epoch=1"], "did you mean 'epochs'?"),
        (["demo", "--inject-noise", "1"], "source.inject_noise: 1.0 is not allowed"),
        (["select", "x", "--keep", "many"], "not a valid float"),
        (["export", "x", "--to", "y"], "Missing option '--format'"),
        (
            ["export", "x", "--to", "y", "--format", "zip"],
            "format: 'zip' is not allowed: Input should be 'indices', 'list', 'webdataset', "
            "'parquet', 'huggingface'",
        ),
        (["extrapolate", "--embeddings", "e", "--out", "o"], "Missing option '--scores'"),
        (["inspect"], "nothing to inspect"),
        (["inspect", "digits://", "--samples", "0"], "samples: 0 is not allowed"),
        (["inspect", "digits://", "--cpus", "0"], "cpus: 0 is not allowed"),
        (["inspect", "digits://", "--set", "seed.fraction=2"], "seed.fraction: 2 is not allowed"),
        (["inspect", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (
            [*TABLES, "--method", "proxy"],
            "method proxy needs the proxy's statistics of each sample",
        ),
        ([*TABLES, "--holdout", "0.9"], "extrapolate.holdout: 0.9 is not allowed"),
    ],
)
def test_bad_usage_exits_with_2(capsys, arguments: list[str], expected: str) -> None:
    code, out, err = _main(capsys, *arguments)
    assert (code, out) == (2, "")
    assert expected in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["status", "nowhere"], "no run here"),
        (["select", "nowhere", "--keep", "0.5"], "no run here"),
        (["report", "nowhere"], "no run here"),
        (["evaluate", "nowhere", "--test", "digits://"], "no run here"),
        (["inspect", "nowhere"], "nowhere"),
        (["inspect", "digits://", "--like", "nowhere"], "no run here"),
    ],
)
def test_what_cannot_be_done_exits_with_1(
    capsys, tmp_path, monkeypatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = _main(capsys, *arguments)
    assert code == 1
    assert expected in err
    assert "Traceback" not in err


def test_init_prints_a_configuration(capsys) -> None:
    code, out, _ = _main(capsys, "init")
    assert code == 0
    assert yaml.safe_load(out)["proxy"]["model"] == "resnet18"


def test_inspect_shows_what_would_be_read_and_what_it_would_cost(capsys) -> None:
    code, out, _ = _main(capsys, "inspect", "digits://", "--cpus", "3")
    assert code == 0
    for expected in (
        "digits",
        "samples     1,797, in 2 fragments",
        "classes     10: 0, 1, 2",
        "smallest 174, median 180, largest 183; all 1,797 labels",
        "all 8x8 pixels",
        "0 of 256 drawn; fewer than 1.2 % of the source, with 95 % confidence",
        "of a run with default settings: 1,797 samples, 180 of them measured",
        "on          as given: 3 CPUs, no GPU",
    ):
        assert expected in out


def test_inspect_names_the_settings_it_used(capsys, tmp_path) -> None:
    (tmp_path / "my.yaml").write_text("run: a\n")
    file = ["--config", str(tmp_path / "my.yaml")]
    changed = ["--set", "seed.fraction=0.2"]
    for arguments, expected in [
        (changed, "of a run with the given settings, otherwise default settings: 1,797 samples"),
        (file + changed, "my.yaml and --set: 1,797 samples, 359 of them measured"),
        (file, "my.yaml: 1,797 samples, 180 of them measured"),
    ]:
        code, out, _ = _main(capsys, "inspect", "digits://", *arguments)
        assert code == 0 and expected in out


def test_inspect_takes_the_settings_of_a_configuration(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://nowhere:1")
    (tmp_path / "c.yaml").write_text("run: r\nsource: {uri: 'digits://'}\nseed: {fraction: 0.5}\n")
    arguments = [
        "inspect",
        "--config",
        str(tmp_path / "c.yaml"),
        "--samples",
        "40",
        "--grid",
        str(tmp_path / "g" / "sheet.png"),
        "--json",
    ]
    code, out, _ = _main(capsys, *arguments, "--set", "limit=1000", "--set", "proxy.epochs=70")
    found = json.loads(out)
    assert code == 0
    assert (found["samples"], found["limit"], found["rejects"]["drawn"]) == (1797, 1000, 40)
    assert (found["cost"]["samples"], found["cost"]["seed_samples"]) == (1000, 500)
    assert (
        found["balance"]["largest"] == 183 and sum(found["balance"]["per_class"].values()) == 1797
    )
    assert "--address auto" in found["cost"]["machine"]  # only then Ray is asked
    assert (tmp_path / "g" / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "FILE"],
        ["select", "FILE"],
        ["report", "FILE"],
        ["evaluate", "FILE", "--test", "digits://"],
        ["export", "FILE", "--format", "list", "--to", "out.txt"],
        ["inspect", "digits://", "--like", "FILE"],
        ["plan", "FILE", "--samples", "1000", "--run", "FILE"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_file_is_no_run(capsys, tmp_path, arguments: list[str]) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"run: {tmp_path}/run\nsource: {{uri: 'digits://'}}\n")
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    code, out, err = _main(capsys, *given)
    assert (code, out) == (1, "")
    assert err == f"raypipe: {file}: a file, not a run; give the folder of a run\n"
    assert file.read_text().startswith("run: ") and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_no_run_in_python_either(tmp_path) -> None:
    file = tmp_path / "kept.csv"
    file.write_text("path,label\n")
    for call in (
        lambda: raypipe.KeepList(file),
        lambda: raypipe.select(str(file), 0.5),
    ):
        with pytest.raises(RunError, match=r"kept\.csv: a file, not a run"):
            call()
    with pytest.raises(RaypipeError, match=r"kept\.csv"):
        raypipe.load_scores(str(file))
    with pytest.raises(RaypipeError, match=r"kept\.csv"):
        raypipe.run({"run": str(file), "source": {"uri": "digits://"}})


def test_a_damaged_run_is_an_error_not_a_traceback(capsys, tmp_path) -> None:
    for content in (b"{", b"[]", b'{"format": 99}', b'{"format": 1, "stages": {"seed": 3}}'):
        (tmp_path / "run.json").write_bytes(content)
        code, _, err = _main(capsys, "status", str(tmp_path))
        assert code == 1
        assert "run.json" in err


def test_the_driver_of_single_workers_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from raypipe import pipeline\n"
        "from raypipe.distributed import context, ray_train\n"
        "from raypipe.stages.proxy import entry, training_job\n"
        "for name in pipeline._STAGES:\n    pipeline.make_stage(name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], {"pydantic", "numpy", "pyarrow"}),
        (["init"], {"numpy", "pyarrow"}),
        (["inspect", "digits://"], set()),
        (["status", "nowhere"], {"pyarrow.compute"}),
    ],
)
def test_quick_verbs_import_little(arguments: list[str], heavy: set[str]) -> None:
    code = (
        "import sys\nfrom raypipe.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print(sorted({heavy | {'ray', 'torch', 'torchvision'}!r} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=True,
    )
    assert done.stdout.strip().endswith("[]")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("verb", ["select", "report"])
def test_select_and_report_import_no_pandas_and_leave_it_importable(
    verb: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "data" / "run-0.1.0", run)
    code = (
        "import sys\nfrom raypipe.cli import main\n"
        f"sys.argv = ['raypipe', {verb!r}, {str(run)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'pandas', 'scipy.stats'} & set(sys.modules)))\n"
        "import pandas, pyarrow\n"
        "print(pyarrow.array(pandas.Series([1, 2])).to_pylist(), end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "[1, 2]"], done.stderr


def test_the_demo_is_the_configuration_of_the_digits() -> None:
    from raypipe.config import demo_settings, load_config, parse_config

    stated = load_config(str(Path(__file__).parent.parent / "jobs" / "configs" / "digits.yaml"))
    demo = parse_config({"run": stated.run, **demo_settings()})
    assert demo.model_dump() == stated.model_dump()
