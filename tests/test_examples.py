"""The examples run as they stand, on a small part of their data, and print what they promise."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import raypipe

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """A function that runs a script of examples/ in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_table_names_every_example() -> None:
    named = set(re.findall(r"\]\(([\w.]+)\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")} <= named
    assert all((FOLDER / name).exists() for name in named)


@pytest.mark.ray
def test_digits(cluster: str, example: Any) -> None:
    printed = example("digits.py", "--samples", "600", "--epochs", "10")
    found = re.search(r"stability (\S+) \((\S+) to (\S+)\)", printed)
    assert found is not None
    stability, low, high = map(float, found.groups())
    assert low <= stability <= high
    assert "keep-0.60.parquet: 360 of 600 images" in printed
    ordered = sorted(
        raypipe.load_scores("runs/digits-example").to_pylist(), key=lambda row: row["score"]
    )
    ends = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    score = {row["sample_id"]: row["score"] for row in ordered}
    assert [score[name] for name in ends["highest"]] == [row["score"] for row in ordered[:-6:-1]]
    assert [score[name] for name in ends["lowest"]] == [row["score"] for row in ordered[:5]]
    assert Path(ends["report"][0]).stat().st_size > 10_000


@pytest.mark.ray
def test_own_scores(cluster: str, example: Any) -> None:
    printed = example("own_scores.py", "--samples", "600")
    found = re.search(r"fidelity (\S+) ", printed)
    assert found is not None and float(found[1]) > 0.1, printed
    assert "baseline class_mean" in printed and "kept 300 of 600, such as ['digit-" in printed
    assert raypipe.load_scores("runs/own-scores/run").num_rows == 600
    assert pq.read_metadata("runs/own-scores/run/keep/keep-0.50.parquet").num_rows == 300


@pytest.mark.ray
def test_train_with_keep_list(cluster: str, example: Any) -> None:
    printed = example(
        *("train_with_keep_list.py", "--samples", "600", "--epochs", "10", "--seeds", "2"),
        *("--strategy", "auto"),  # never refused, however short the training
    )
    accuracies = re.findall(r"^seed \d: keep-list (\S+) %, random (\S+) %", printed, re.MULTILINE)
    assert len(accuracies) == 2
    assert all(50 < float(accuracy) <= 100 for pair in accuracies for accuracy in pair), printed
    assert "180 of 600 images, tested on 1197" in printed
    means = re.search(r"mean: keep-list (\S+) %, random (\S+) %", printed)
    gain = re.search(r"difference (\S+) points", printed)
    assert means is not None and gain is not None
    assert float(gain[1]) == pytest.approx(float(means[1]) - float(means[2]), abs=0.11)


def cells() -> list[dict[str, Any]]:
    return json.loads((FOLDER / "cifar10.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_committed_with_its_results() -> None:
    text = (FOLDER / "cifar10.ipynb").read_text(encoding="utf-8")
    assert len(text) < 1.5e6
    outputs = [output for cell in cells() for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert not any(output["output_type"] == "error" for output in outputs)
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert "report/index.html" in printed
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home|Users)\b", printed), "a path of a machine"


@pytest.mark.ray
def test_the_cells_of_the_notebook(
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown: list[int] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.gcf().axes)) or plt.close("all"))
    for name, value in {"CIFAR10": "digits://", "SAMPLES": "600", "EPOCHS": "30"}.items():
        monkeypatch.setenv(name, value)
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in cells() if cell["cell_type"] == "code"):
        source = "".join(cell["source"])
        exec(compile(source, f"cifar10.ipynb, code cell {number}", "exec"), space)
    assert shown == [1, 1, 20, 20, 1]
    printed = capsys.readouterr().out
    assert "300 of 600 images, such as digits/" in printed and "sections: " in printed
    assert space["images"]["score"].to_pylist() == sorted(
        space["scores"]["score"].to_pylist(), reverse=True
    )
    assert len(space["keep"]) == 300 and Path("runs/cifar10-notebook/report/index.html").exists()
