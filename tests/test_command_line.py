"""The command line and the package as a newcomer meets them. No Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import raypipe
from raypipe.cli import cli
from raypipe.config import load_config, parse_config
from raypipe.errors import ConfigError, RunError
from raypipe.progress import describe_progress


def output(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "raypipe", "--version"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert shown == f"raypipe, version {raypipe.__version__}\n"


def test_the_package_lists_what_it_offers() -> None:
    assert set(raypipe.__all__) <= set(dir(raypipe))


def test_the_short_configuration_is_valid_and_short(tmp_path: Path) -> None:
    text = output("init", "--minimal")
    assert len(text.splitlines()) < 25
    settings = yaml.safe_load(text)
    assert set(settings) == {"run", "source", "seed", "proxy", "select"}
    # what it states are the defaults, and what to fill in
    defaults = parse_config({"run": "runs/first", "source": {"uri": "data/train"}})
    assert parse_config(settings) == defaults
    (tmp_path / "my.yaml").write_text(text)
    assert load_config(str(tmp_path / "my.yaml")).run.endswith("runs/first")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "run: a\nproxy:\n  lr: 1\nproxy:\n  epochs: 3\n",
            "'proxy' is in line 2 and again in line 4",
        ),
        ("run: a\nproxy:\n  lr: 1\n  lr: 2\n", "'lr' is in line 3 and again in line 4"),
    ],
)
def test_a_section_that_is_there_twice_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(str(tmp_path / "my.yaml"))


def test_anchors_and_merge_keys_stay_possible(tmp_path: Path) -> None:
    text = "run: a\nsource: {uri: x}\nproxy: &p {epochs: 7}\n"
    (tmp_path / "my.yaml").write_text(text.replace("&p {epochs: 7}", "{<<: {lr: 1}, epochs: 7}"))
    assert load_config(str(tmp_path / "my.yaml")).proxy.epochs == 7


def test_a_configuration_is_read_from_a_pipe() -> None:
    read, write = os.pipe()
    os.write(write, b"run: a\nproxy: {epochs: 7}\nsource: {uri: x}\n")
    os.close(write)
    assert load_config(f"/dev/fd/{read}").proxy.epochs == 7
    os.close(read)


@pytest.mark.parametrize(
    "use",
    [
        raypipe.load_scores,
        raypipe.KeepList,
        lambda file: raypipe.load_scores(file, snapshot="x"),
        lambda file: raypipe.select(file, 0.5),
        lambda file: raypipe.evaluate(file, "test"),
        lambda file: raypipe.Run(file).fragments(),
        lambda file: raypipe.Run(file).classes(),
        lambda file: raypipe.Run(file).ledger(),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_where_python_expects_a_run(
    tmp_path: Path, use: Callable[[str | Path], object], kind: type[str] | type[Path]
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("run: a\n")
    with pytest.raises(RunError, match=r"my\.yaml: a file, not a run"):
        use(kind(file))


def test_python_takes_paths_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("run: a\nsource: {uri: digits://}\n")
    for config in (file, str(file), {"run": tmp_path, "source": {"uri": Path("digits://")}}):
        with pytest.raises(ConfigError, match=r"run\.py|until|nowhere"):
            raypipe.run(config, overrides=["proxy.epochs=2"], until="nowhere")
        with pytest.raises(ConfigError, match=r"proxy\.epochs: -1"):
            raypipe.run(config, overrides=["proxy.epochs=-1"])
    with pytest.raises(ConfigError, match="a list is not allowed"):
        raypipe.run([1])  # type: ignore[arg-type]


@pytest.mark.parametrize("count", ["1000000", "1e6", "1_000_000"])
def test_a_plan_for_a_round_number(tmp_path: Path, count: str) -> None:
    (tmp_path / "my.yaml").write_text("run: a\nsource: {uri: x, format: parquet}\n")
    assert "images      1,000,000" in output("plan", str(tmp_path / "my.yaml"), "--samples", count)


@pytest.mark.parametrize("option", ["--image-bytes=nan", "--image-bytes=inf", "--classes=0"])
def test_a_plan_for_amounts_that_are_none(tmp_path: Path, option: str) -> None:
    (tmp_path / "my.yaml").write_text("run: a\nsource: {uri: x, format: parquet}\n")
    command = ["plan", str(tmp_path / "my.yaml"), "--samples=10", option]
    with pytest.raises(ConfigError, match="image-bytes and classes: give at least 1"):
        CliRunner().invoke(cli, command, catch_exceptions=False)


def test_a_run_where_a_configuration_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder; give the YAML file of the settings$"):
        load_config(str(tmp_path))
    (tmp_path / "config.yaml").write_text("run: a\n")
    with pytest.raises(ConfigError, match=r"settings; of this run, that is .*/config\.yaml$"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("count", ["0", "1.5", "many", "-3", "inf", "nan"])
def test_a_plan_for_no_number_of_images(count: str) -> None:
    result = CliRunner().invoke(cli, ["plan", "my.yaml", f"--samples={count}"])
    assert result.exit_code == 2 and "is not a whole number above 0" in result.output


def test_one_fragment_is_no_fragments() -> None:
    about = {"count": 5, "total": 10, "rate": 1, "unit": "samples", "fragments": 1, "queued": 2}
    assert "1 fragment done, 2 queued" in describe_progress(about)
    assert "2 fragments done" in describe_progress({**about, "fragments": 2})


def test_completion_is_as_the_reference_says() -> None:
    environment = {**os.environ, "_RAYPIPE_COMPLETE": "bash_source"}
    code = "import sys; sys.argv[0] = 'raypipe'; from raypipe.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    ).stdout
    assert "complete -o nosort -F _raypipe_completion raypipe" in shown
