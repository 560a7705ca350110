"""The tutorial "Add a score from your own package": its files are written, its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guides" / "own-package.md"
FILE = re.compile(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = (
    "source.limit=600 extrapolate.method=knn proxy.image_size=8 proxy.epochs=5 measure.max_actors=1 "
    "embed.max_actors=1 extrapolate.folds=1 extrapolate.rehearsal=false report.images=4 "
    "trust.min_spearman=-1 trust.min_stability=-1 trust.min_accuracy_over_chance=-1"
)
"""Settings that make the run of the tutorial quick, and nothing else different."""


@pytest.mark.ray
def test_the_tutorial_works_as_written(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = dict(FILE.findall(text))
    commands = [
        line.removeprefix("$ ") for block in CONSOLE.findall(text) for line in block.splitlines()
    ]
    assert len(files) == 4 and len(commands) == 5
    assert text.count("```") == 2 * (len(files) + len(CONSOLE.findall(text)))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    site = tmp_path / "site"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    outputs = {}
    for command in commands:
        words = command.split()
        if words[0] == "pip":
            offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
            words = ["python", "-m", *words, "--quiet", *offline]
        if words[:2] == ["raypipe", "run"]:
            words += [word for change in QUICK.split() for word in ("--set", change)]
        if words[0] == "raypipe":
            words = ["python", "-m", *words]
        words[0] = sys.executable
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
        outputs[command] = done.stdout
    assert "1 passed" in outputs["python -m pytest -q test_late_doubt.py"]
    assert "mean probability of all classes but the label" in outputs["raypipe scores"]
    assert "from late-doubt 0.1.0" in outputs["raypipe scores"]
    measured = pq.read_table(tmp_path / "runs" / "late-doubt" / "measured")
    assert "late_doubt:LateDoubt" in measured.column_names
