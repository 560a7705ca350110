"""What `soak.py` disturbs: a small run with every stage, the command that makes it, and the workers of its Ray cluster; and how two runs compare."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from raypipe.sources.synthetic import Recipe, make_sample

TARS = 12
KINDS = {
    "trainer": re.compile(r"^ray::(RayTrainWorker|execute\.)"),
    "controller": re.compile(r"^ray::TrainController"),
    "actor": re.compile(r"^ray::\w*MapWorker"),
    "task": re.compile(r"^ray::_[a-z_]+$"),
}
"""By what Ray writes into the title of a process; the functions that raypipe runs as tasks have names with an underscore before them."""
COMPARED = ("scores/*", "rejects/*", "keep/*", "measured/*.parquet", "extrapolator/*")
LOOK = 0.2
"""Seconds between two looks at which processes there are."""


def configuration(folder: Path, run: Path) -> dict[str, Any]:
    """A run that has every stage and every kind of process, at a size at which starting these is most of the work."""
    return {
        "run": str(run),
        "source": {
            "uri": str(folder / "source"),
            "format": "webdataset",
            "fragment_samples": 64,
            "max_reject_fraction": 0.2,
        },
        "seed": {"fraction": 0.4},
        "proxy": {
            "model": "small",
            "image_size": 16,
            "epochs": 4,
            "parts": 1,
            "batch_size": 64,
            "checkpoints": 2,
            "flip": False,
            "workers": 2,
            "max_failures": 3,
        },
        "measure": {"scores": ["el2n", "moso"], "max_actors": 1},
        "extrapolate": {"epochs": 3, "neighbours": 8, "folds": 1, "judge_published": False},
        "trust": {"min_spearman": -1, "min_accuracy_over_chance": -1},
        "select": {"keep": [0.3, 0.7]},
        "report": {"images": 8},
        "cluster": {"patience_seconds": 200},
    }


def write_source(folder: Path, samples: int) -> None:
    """Tars of PNG files, of which one in a hundred is damaged."""
    folder.mkdir(parents=True)
    recipe = Recipe(samples=samples, size=24, label_noise=0.05, broken=0.01, encoded="png")
    for tar in range(TARS):
        with tarfile.open(folder / f"part-{tar:03d}.tar", "w") as file:
            for index in range(tar * samples // TARS, (tar + 1) * samples // TARS):
                image, label = make_sample(recipe, index)
                assert isinstance(image, bytes)
                for name, content in (
                    (f"{index:07d}.png", image),
                    (f"{index:07d}.cls", str(label).encode()),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    file.addfile(entry, io.BytesIO(content))


class Workers:
    """The processes that work for the Ray cluster of this process."""

    def __init__(self) -> None:
        found = [
            process
            for process in psutil.Process().children(recursive=True)
            if process.name() == "raylet"
        ]
        self._raylet, self._pids, self._due = found[0], list[int](), 0.0
        self._over: set[int] = set()

    def titles(self) -> dict[int, str]:
        """Titles of those that work by pid, without what Ray is about to end."""
        if time.monotonic() >= self._due:
            self._pids = [process.pid for process in self._raylet.children()]
            self._due = time.monotonic() + LOOK
        found = {pid: title_of(pid) for pid in self._pids if pid not in self._over}
        return {pid: title for pid, title in found.items() if kind_of(title)}

    def of(self, kind: str) -> dict[int, str]:
        return {pid: title for pid, title in self.titles().items() if kind_of(title) == kind}

    def over(self, driver_too: bool = False) -> None:
        """What a stage that ended had, and tasks too when its driver is dead, is not met any more."""
        self._due = 0.0
        self._over |= {
            pid for pid, title in self.titles().items() if driver_too or kind_of(title) != "task"
        }


def title_of(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().rstrip(b"\0").decode(errors="replace")
    return ""


def kind_of(title: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.match(title)), "")


class Driver:
    """The command, and which stage it is in."""

    def __init__(self, run: Path, config: Path, address: str) -> None:
        self._run, self.started = run, time.monotonic()
        self._before = self._ledger()  # of another driver
        self.stage, self.since = "start", self.started
        self._log = open(run.with_suffix(".log"), "ab")  # noqa: SIM115 (as long as the driver)
        command = [sys.executable, "-m", "raypipe.cli", "run", str(config)]
        environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        self._from = self._log.tell()
        self.process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def look(self) -> bool:
        """Whether it went on to another stage since the last look."""
        found = self._ledger()
        if found in (self._before, ("", 0)) or found[0] == self.stage:
            return False
        self.stage, self.since = found[0], time.monotonic()
        return True

    def _ledger(self) -> tuple[str, int]:
        """The stage under way, and which attempt at it this is."""
        try:
            stages = json.loads((self._run / "run.json").read_bytes())["stages"]
        except (OSError, ValueError):
            return "", 0
        return next(
            (
                (name, record["attempts"])
                for name, record in stages.items()
                if record["state"] == "running"
            ),
            ("", 0),
        )

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def said(self) -> str:
        """The error it ended with."""
        lines = (
            self._run.with_suffix(".log")
            .read_bytes()[self._from :]
            .decode(errors="replace")
            .strip()
            .splitlines()
        )
        return next(
            (line for line in reversed(lines) if line.startswith("raypipe: ")),
            lines[-1] if lines else "nothing",
        )


@dataclasses.dataclass
class Found:
    """What a run that ended has that the truth has not, and the other way round."""

    lost: int
    doubled: int
    differ: list[str]
    left: list[str]


def contents(run: Path) -> dict[str, str]:
    """A hash of every file that must be the same."""
    files = [
        file for pattern in COMPARED for file in run.glob(pattern) if not file.name.startswith(".")
    ]
    return {
        str(file.relative_to(run)): hashlib.blake2b(file.read_bytes()).hexdigest() for file in files
    }


def ids_of(run: Path) -> Counter[str]:
    """How often each sample is in scores and rejects."""
    files = [file for folder in ("scores", "rejects") for file in (run / folder).glob("*.parquet")]
    return Counter(
        name
        for file in files
        for name in pq.read_table(file, columns=["sample_id"])["sample_id"].to_pylist()
    )


def names_of(run: Path) -> set[str]:
    return {
        str(file.relative_to(run))
        for file in run.rglob("*")
        if file.is_file() and file.parent.name != "logs"
    }


def compare(truth: Path, run: Path) -> Found:
    expected, samples = contents(truth), ids_of(truth)
    there, counts = contents(run), ids_of(run)
    differ = sorted(name for name in {*expected, *there} if expected.get(name) != there.get(name))
    doubled = sum(count > 1 for count in counts.values()) + len(set(counts) - set(samples))
    return Found(
        len(set(samples) - set(counts)), doubled, differ, sorted(names_of(run) - names_of(truth))
    )
