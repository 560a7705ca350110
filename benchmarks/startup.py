"""What there is before any work: size of the wheel, weight of what a plain install brings, imports, and the commands that start nothing.

    python benchmarks/startup.py [--run RUN ...] [--repeats 5] [--demo 2 [--before ../before]]

Imports and commands are processes of their own, the best of --repeats, in seconds of the clock and of the processor; `python` alone is among them. `select` and
`report` write into the runs (the same again), `inspect` looks at the source that the run had. Weights are of the files that pip installed,
without extras. --demo times whole demos, from the command to its end; with --before in turn with those of another checkout.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from raypipe.runs.run import Run

ROOT = Path(__file__).resolve().parent.parent
RAYPIPE = """
import sys
from raypipe.cli import main
try:
    main()
finally:
    print("with", *sorted({"ray", "torch", "pandas"} & set(sys.modules)), file=sys.stderr)
"""
WITHIN = 1.0
"""Seconds in which these commands are to answer."""
CUDA = ("torch", "triton", "nvidia", "cuda")
"""How names of what comes with PyTorch begin, torchvision and torch-geometric among them."""
SHOWN = 12
"""Packages that are listed one by one."""


def wheel() -> int:
    """Bytes of the wheel of this checkout."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(
            ROOT / "raypipe", Path(folder, "raypipe"), ignore=shutil.ignore_patterns("__pycache__")
        )
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            folder,
            folder,
        ]
        subprocess.run(command, check=True)
        (file,) = Path(folder).glob("*.whl")
        return file.stat().st_size


def closure(name: str) -> Iterator[Distribution]:
    """What a package without extras needs, itself left out, as it is installed here. May come twice."""
    seen: set[tuple[str, str]] = set()
    waiting = [(name, "")]
    while waiting:
        package, extra = waiting.pop()
        for text in distribution(package).requires or ():
            needed = Requirement(text)
            if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
                continue
            for wanted in ("", *sorted(needed.extras)):
                place = (_plain(needed.name), wanted)
                if place not in seen:
                    try:
                        yield distribution(needed.name)
                    except PackageNotFoundError:
                        continue  # for another platform
                    seen.add(place)
                    waiting.append(place)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def weight(package: Distribution) -> int:
    """Bytes of the files of a package."""
    files = (package.locate_file(file) for file in package.files or ())
    return sum(os.path.getsize(str(file)) for file in files if os.path.isfile(str(file)))


def best(command: list[str], repeats: int) -> tuple[float, float, str]:
    """Seconds of the clock, seconds of the processor, and the last line that it wrote to stderr."""
    times, processor, said = [], [], ""
    for _ in range(repeats):
        start, used = time.perf_counter(), sum(os.times()[2:4])
        done = subprocess.run(command, capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        processor.append(sum(os.times()[2:4]) - used)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[2:])}: {done.stderr}")
        said = (done.stderr.strip().splitlines() or [""])[-1]
    return min(times), min(processor), said


def commands(uri: str, repeats: int) -> None:
    """The commands over one run."""
    run = Run(uri)
    samples, shards = run.ledger()["extrapolate"].samples, len(run.done("scores"))
    print(f"\n{samples:,} samples in {shards:,} score shards")
    for words in (
        ["status", uri],
        ["inspect", "--config", run.path("config.yaml")],
        ["select", uri],
        ["report", uri],
    ):
        seconds, processor, said = best([sys.executable, "-c", RAYPIPE, *words], repeats)
        slow = "" if seconds < WITHIN else f"  more than {WITHIN:g} s"
        heavy = (
            f"  imports {said.removeprefix('with ')}" if said.removeprefix("with").strip() else ""
        )
        print(
            f"raypipe {words[0]:<22}{seconds:>8.2f} s{processor:>8.2f} processor s{slow}{heavy}",
            flush=True,
        )


def demos(checkouts: list[Path], rounds: int) -> None:
    """Demos of all checkouts in turn, each in a folder of its own."""
    for number, checkout in itertools.product(range(rounds), checkouts):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "raypipe", "demo"],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(checkout)},
                capture_output=True,
                check=True,
            )
            seconds = time.perf_counter() - start
        which = "" if checkout == ROOT else f" of {checkout.name}"
        print(f"demo {number + 1}{which:<24}{seconds:>8.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", action="append", default=[], help="a finished run; may be repeated"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--demo", type=int, default=0, help="how many demos")
    parser.add_argument("--before", type=Path, help="another checkout, whose demos are timed too")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"\nwheel of raypipe {wheel() / 1e3:>27,.0f} kB")
    packages = {_plain(package.name): weight(package) for package in closure("raypipe")}
    heaviest = sorted(packages, key=lambda name: -packages[name])
    print(f"{len(packages)} packages installed with it {sum(packages.values()) / 1e6:>17,.0f} MB")
    for name in heaviest[:SHOWN]:
        print(f"  {name:<36}{packages[name] / 1e6:>6,.0f}")
    print(f"  {'others':<36}{sum(packages[name] for name in heaviest[SHOWN:]) / 1e6:>6,.0f}")
    print(
        f"  of all, PyTorch and CUDA {sum(size for name, size in packages.items() if name.startswith(CUDA)) / 1e6:>17,.0f}\n"
    )
    for what, command in (
        ("python", ["-c", ""]),
        ("import raypipe", ["-c", "import raypipe"]),
        ("raypipe --help", ["-c", RAYPIPE, "--help"]),
        ("raypipe init", ["-c", RAYPIPE, "init"]),
    ):
        seconds, processor, _ = best([sys.executable, *command], arguments.repeats)
        print(f"{what:<30}{seconds:>8.2f} s{processor:>8.2f} processor s", flush=True)
    for uri in arguments.run:
        commands(uri, arguments.repeats)
    before = [arguments.before.resolve()] if arguments.before else []
    demos([*before, ROOT], arguments.demo)


if __name__ == "__main__":
    main()
