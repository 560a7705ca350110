"""The package in examples/plugin: installed, used in a run, and missing where the run is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import SMALL, digit_images

ROOT = Path(__file__).resolve().parents[1]
SCORE = "late-doubt"
PIXELS = """
import numpy as np
from torch import nn

def negatives(image):
    if int(image.sum()) % 97 == 0:
        raise ValueError("a bad number")
    return np.stack([image, 255 - image], 2)

def darker(image, generator):
    image[:] = image * generator.uniform(0.9, 1)
    return image

def means(image_size, channels):
    return nn.Sequential(nn.AvgPool2d(image_size // 2), nn.Flatten())

means.default_cfg = {"input_size": (2, 16, 16), "mean": (0.5, 0.5), "std": (0.25, 0.25)}
"""


PARTS = """
from raypipe.selection import KeepStrategy
from torch import nn

def means(image_size, channels):
    return nn.Sequential(nn.AvgPool2d(image_size // 2), nn.Flatten())

class Middle(KeepStrategy):
    summary = kept = "around a score of 0.5"
    def preference(self, chunk, options):
        return -abs(chunk.score - 0.5)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, as `pip install` writes it."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    subprocess.run(["cp", "-r", str(ROOT / "examples" / "plugin"), str(source)], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    install += ["--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(folder / "site"), str(source)], check=True)
    return folder / "site"


def raypipe(folder: Path, package: Path | None, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command in a process of its own, with the package or without."""
    path = [str(ROOT), *([str(package)] if package else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "raypipe", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that uses the score and the strategy."""
    folder = tmp_path_factory.mktemp("finished")
    config = json.loads(json.dumps(SMALL))
    config["run"] = "run"
    (folder / "own_pixels.py").write_text(PIXELS)
    config["source"]["transform"] = "own_pixels:negatives"
    config["proxy"] |= {"augment": "own_pixels:darker", "channels": 2}
    config["measure"] = {"scores": [SCORE], "options": {SCORE: {"epochs": 2}}, "max_actors": 1}
    config["extrapolate"] |= {"method": "knn", "rehearsal": False}
    config["embed"] = {"model": "own_pixels:means"}
    config["select"] = {
        "keep": [0.5],
        "strategy": "uncontradicted",
        "options": {"uncontradicted": {"max_loss": 2}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = raypipe(folder, package, "run", "run.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.ray
def test_a_run_measures_its_score_and_cuts_by_its_strategy(finished: Path) -> None:
    measured = pq.read_table(finished / "run" / "measured", columns=[SCORE])
    assert measured[SCORE].null_count == 0 and len(set(measured[SCORE].to_pylist())) > 50
    metadata = pq.read_schema(finished / "run" / "keep" / "keep-0.50.parquet").metadata
    assert metadata[b"raypipe.strategy"] == b"uncontradicted"
    assert json.loads(metadata[b"raypipe.options"])["max_loss"] == 2
    scores = pq.read_table(finished / "run" / "scores").num_rows
    kept = pq.read_metadata(finished / "run" / "keep" / "keep-0.50.parquet").num_rows
    assert kept == round(scores / 2)


@pytest.mark.ray
def test_a_module_beside_the_configuration_reaches_the_workers(finished: Path) -> None:
    images = digit_images(600)[0].astype(int)
    bad = np.flatnonzero(images.sum((1, 2)) % 97 == 0)
    assert 0 < len(bad) < 10
    rejects = pq.read_table(finished / "run" / "rejects").to_pylist()
    assert len(rejects) == len(bad)
    reason = "source.transform: ValueError: a bad number, own_pixels.py line 7"
    assert {row["reason"] for row in rejects} == {reason}
    shard = pq.read_table(next((finished / "run" / "seed").glob("seed-*.parquet")))
    pixels = np.frombuffer(shard["image"][0].as_py(), np.uint8).reshape(2, 8, 8).astype(int)
    assert (pixels.sum(0) == 255).all()
    shard = pq.read_table(next((finished / "run" / "embeddings").glob("*.parquet")))
    embeddings = np.array(shard["embedding"].to_pylist(), np.float64)
    assert embeddings.shape == (len(shard), 8) and embeddings.std(0).min() > 0
    np.testing.assert_allclose(embeddings[:, :4], -embeddings[:, 4:], atol=0.05)  # of negatives


@pytest.mark.ray
def test_ledger_and_report_describe_both(finished: Path) -> None:
    ledger = json.loads((finished / "run" / "run.json").read_text())["stages"]
    (score,) = ledger["measure"]["detail"]["code"]
    assert score["name"] == SCORE and score["package"] == "raypipe-example 0.1.0"
    assert score["options"] == {"epochs": 2} and score["high_is_hard"] is True
    page = (finished / "run" / "report" / "index.html").read_text()
    assert "mean probability of all classes but the label in the last epochs" in page
    assert "the highest scores of the samples whose label the proxy does not contradict" in page
    assert "raypipe-example 0.1.0" in page


@pytest.mark.ray
def test_reading_the_run_needs_no_package(finished: Path) -> None:
    for arguments in (
        ["status", "run"],
        ["report", "run"],
        ["select", "run", "--strategy", "top", "--keep", "0.25"],
        ["compare", "run", "run"],
    ):
        done = raypipe(finished, None, *arguments)
        assert done.returncode == 0, (arguments, done.stderr[-2000:])
    assert SCORE in (finished / "run" / "report" / "index.html").read_text()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("installed", "arguments", "message"),
    [
        (True, [], "'uncontradicted' is code from outside raypipe"),
        (True, ["--allow-code"], ""),
        (True, ["--strategy", "uncontradicted"], ""),
        (True, ["--strategy", "uncontradictd"], "did you mean 'uncontradicted'?"),
        (False, ["--allow-code"], "no package installed on"),
    ],
)
def test_select_imports_what_the_caller_names_or_allows(
    finished: Path, package: Path, installed: bool, arguments: list[str], message: str
) -> None:
    done = raypipe(finished, package if installed else None, "select", "run", *arguments)
    assert message in done.stderr
    assert done.returncode == (2 if message else 0), done.stderr


@pytest.mark.long
@pytest.mark.ray
def test_changed_code_is_measured_again_and_named(finished: Path, package: Path) -> None:
    again = raypipe(finished, package, "run", "run.yaml", "--until", "measure")
    assert "measure     already done" in again.stderr, again.stderr
    module = package / "raypipe_example" / "late_doubt.py"
    before = pq.read_table(finished / "run" / "measured")[SCORE].to_pylist()
    text = module.read_text()
    try:
        module.write_text(text.replace("return 1 - ", "return 2 - "))
        changed = raypipe(finished, package, "run", "run.yaml", "--until", "measure")
    finally:
        module.write_text(text)
    line = f"measure     the code of measure.scores {SCORE} has changed: running it again"
    assert line in changed.stderr, changed.stderr
    assert "seed        already done" in changed.stderr
    after = pq.read_table(finished / "run" / "measured")[SCORE].to_pylist()
    assert after == pytest.approx([1 + value for value in before])
    (finished / "own_pixels.py").write_text(PIXELS.replace("255 -", "254 -"))
    changed = raypipe(finished, package, "run", "run.yaml", "--until", "seed")
    line = "seed        the code of source.transform own_pixels:negatives has changed: running it"
    assert line in changed.stderr, changed.stderr


@pytest.mark.long
@pytest.mark.ray
def test_parts_of_modules_work_in_a_run_its_evaluation_and_its_nights(tmp_path: Path) -> None:
    for module in ("test_check_source", "test_check_extrapolator"):
        text = (ROOT / "tests" / "testing" / f"{module}.py").read_text()
        (tmp_path / f"{module}.py").write_text(text)
    (tmp_path / "own_parts.py").write_text(PARTS)
    images, labels = digit_images(600)
    for part, folder in enumerate(("data", "data", "test")):
        rows, file = slice(part, None, 3), tmp_path / folder / f"{part}.npz"
        file.parent.mkdir(exist_ok=True)
        np.savez(file, images=images[rows], labels=labels[rows])
    config = json.loads(json.dumps(SMALL))
    config["run"] = "run"
    config["source"] = {"uri": "data", "format": "test_check_source:Npz", "fragment_samples": 100}
    config["measure"] = {"scores": ["el2n"], "el2n": {"at": "trajectory"}, "max_actors": 1}
    method = "test_check_extrapolator:Nearest"
    config["extrapolate"] |= {"method": method, "options": {method: {"power": 2}}}
    config["extrapolate"] |= {"rehearsal": False}
    config["embed"] |= {"model": "own_parts:means"}
    config["select"] |= {"strategy": "own_parts:Middle"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = raypipe(tmp_path, None, "run", "run.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    scores = pq.read_table(tmp_path / "run" / "scores")
    assert len(scores) == 400 and scores["score"].null_count == 0
    ledger = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    (code,) = ledger["extrapolate"]["detail"]["code"]
    assert code["name"] == method and code["options"] == {"power": 2.0}
    assert ledger["index"]["detail"]["code"][0]["name"] == "test_check_source:Npz"
    options = ["--test", "test", "--test-set", "format=test_check_source:Npz"]
    options += ["--keep", "0.5", "--seeds", "1", "--epochs", "1"]
    done = raypipe(tmp_path, None, "evaluate", "run", *options, "--strategies", "own_parts:Middle")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "own_parts:Middle" in done.stdout
    os.rename(tmp_path / "test" / "2.npz", tmp_path / "data" / "2.npz")
    command = [sys.executable, str(ROOT / "jobs" / "nightly.py"), "--config", "run.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    night = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert night.returncode == 0, night.stderr[-3000:]
    assert json.loads(night.stdout.splitlines()[-1])["samples"]["new"] == 200
    scores = pq.read_table(tmp_path / "run" / "scores")
    assert len(scores) == 600 and scores["score"].null_count == 0


@pytest.mark.ray
def test_a_worker_without_the_package_says_so(finished: Path, package: Path) -> None:
    code = (
        "import sys, ray; ray.init(num_cpus=1, log_to_driver=False, logging_level='ERROR')\n"
        f"sys.path.append({str(package)!r})\n"
        "import raypipe\n"
        "raypipe.run('run.yaml', overrides=['run=other'], redo=['measure'], until='measure')\n"
    )
    shutil.copytree(finished / "run", finished / "other")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done: Any = subprocess.run(
        [sys.executable, "-c", code], cwd=finished, env=environment, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "measure.scores: no installed package declares the score 'late-doubt'" in last
    assert "install the package that has it on every node" in last


def test_scores_and_init_list_installed_parts(package: Path, tmp_path: Path) -> None:
    listed = raypipe(tmp_path, package, "scores").stdout
    assert f"{SCORE:<20} mean probability of all classes but the label in" in listed
    assert "from raypipe-example 0.1.0" in listed
    printed = raypipe(tmp_path, package, "init").stdout
    assert "late-doubt (raypipe-example 0.1.0): mean probability" in printed
    assert "max_loss: 3.0" in printed and "Samples with a higher loss are kept last." in printed
    assert yaml.safe_load(printed)["measure"]["options"] == {}
    assert SCORE not in raypipe(tmp_path, None, "scores").stdout


def test_wrong_options_are_one_line_each_before_anything_starts(
    package: Path, tmp_path: Path
) -> None:
    config = {
        "run": "run",
        "source": {"uri": "digits://"},
        "measure": {"scores": [SCORE], "options": {SCORE: {"epochs": 0, "epoch": 1}}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = raypipe(tmp_path, package, "run", "run.yaml")
    assert done.returncode == 2
    assert f"  measure.options.{SCORE}.epochs: 0 is not allowed: " in done.stderr
    assert (
        f"  measure.options.{SCORE}.epoch: unknown setting; did you mean 'epochs'?" in done.stderr
    )
    assert not (tmp_path / "run").exists()
