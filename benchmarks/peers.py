"""Alignments, selection and kNN extrapolation: raypipe against other packages, in one table each.

    python benchmarks/peers.py [--threads 1] [--rounds 3] [--only alignment,selection,knn]
                               [--networks resnet18:32,...] [--dir FOLDER]

Each package is pinned (`PACKAGES`) and gets an environment of its own in FOLDER, which sees the
packages of this environment, so that torch isn't installed again. What can't be installed or fails
is a row that says so. Without --dir the environments go into a temporary folder.

Alignment: the product of every image's gradient with one vector, on networks in eval mode, by each
package's own call (`peer_runners/`). The vector is the gradient of two of the images; captum and
kronfluence take these images and compute the vector, which their time includes. "left out" names
the parameters that a package does not cover. The error is the largest difference from a loop in
float64 over the same parameters, in units of the largest alignment. Each way runs with several
batch sizes in the first round, and with the fastest from then on; slow ways get fewer images.
Everything that is computed once per call, such as folding BatchNorm, counts. `x ours` is the time
of an image in units of ours. "by hand" are ways without a package: a loop over images, the
published MoSo code's loop, `vmap(grad)` and `torch.func.jvp`.

Selection: the rows of a keep-list from random scores in memory. `top` is the highest scores, `ccs`
is CCS with a fixed cut-off. Extrapolation: kNN as published, with 10 % of the samples scored, once
with the matrix of all distances and once by raypipe; the error is that on 200 rows, against
float64, in units of the largest prediction.

Every run is a process of its own, one at a time, and all ways take turns, round by round. Times are
the least of all rounds: with one thread of the processor time of the process, which other programs
disturb less, with more threads of wall time. Memory is the peak above what the process had before.
Interrupted, it prints what it has so far of the alignments.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

RUNNERS = Path(__file__).parent / "peer_runners"
PACKAGES = {
    "dattri": "0.3.0",
    "captum": "0.9.0",
    "kronfluence": "1.0.1",
    "traker": "0.3.2",
    "opacus": "1.6.0",
    "datacull": "1.0.2",
    "cleanlab": "2.9.0",
}
KEPT_AS_THEY_ARE = ("torch", "torchvision", "numpy", "scipy", "pandas", "scikit-learn")
"""Packages that an installation must take from this environment."""
NETWORKS = "resnet18:32,resnet18:64,resnet50:64"
IMAGES = 32
SIZES = (100_000, 1_000_000)
KEEP, CUTOFF, STRATA = 0.3, 0.3, 50
SAMPLES, SCORED, WIDTH, CHECKED = 100_000, 10_000, 128, 200
"""Of the extrapolation: samples, those of them with a score, width of embeddings, rows compared."""


@dataclass
class Way:
    """A row of a table, and what its runs took."""

    title: str
    function: str
    package: str = ""
    batches: tuple[int, ...] = ()
    images: int = 0
    left_out: str = ""
    runs: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def best(self, key: str) -> dict[str, Any]:
        return min(self.runs, key=lambda run: run[key])

    def fastest(self, key: str) -> tuple[int, ...]:
        """Return the fastest batch size; nothing if no run succeeded."""
        return (self.best(key)["batch"],) if self.runs else ()


def alignments() -> list[Way]:
    norm = "BatchNorm"
    return [
        Way("ours", "with_ours:ours", "", (16, 32), 32),
        Way("kronfluence", "with_kronfluence:identity", "kronfluence", (16, 32), 32, norm),
        Way("opacus", "with_opacus:per_sample", "opacus", (4, 16), 16),
        Way("captum, sample-wise", "with_captum:tracincp_sample_wise", "captum", (4, 16), 16, norm),
        Way("captum", "with_captum:tracincp", "captum", (1, 4), 8),
        Way("traker", "with_traker:featurize", "traker", (4, 16), 16),
        Way("dattri", "with_dattri:tracin", "dattri", (4,), 4),
        Way("by hand: jvp", "by_hand:forward_mode", "", (16, 32), 32),
        Way("by hand: loop", "by_hand:loop", "", (1,), 8),
        Way("by hand: vmap(grad)", "by_hand:vmap_grad", "", (4, 16), 16),
        Way("by hand: MoSo's loop", "by_hand:moso", "", (1,), 8),
    ]


def selections() -> list[Way]:
    return [
        Way("top: ours", "on_arrays:top"),
        Way("top: DataCull", "with_datacull:top", "datacull"),
        Way("top: cleanlab", "with_cleanlab:top", "cleanlab"),
        Way("ccs: ours", "on_arrays:ccs"),
        Way("ccs: DataCull", "with_datacull:ccs", "datacull"),
    ]


def extrapolations() -> list[Way]:
    return [Way("ours", "on_arrays:knn"), Way("all distances", "published_knn:dense")]


class Environments:
    """The interpreters of the packages, created when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._constraints = folder / "constraints.txt"
        lines = (f"{name}=={importlib.metadata.version(name)}" for name in KEPT_AS_THEY_ARE)
        self._constraints.write_text("\n".join(line.split("+")[0] for line in lines) + "\n")

    def interpreter(self, package: str) -> str:
        """Return the interpreter of a package; raise RuntimeError if it can't be installed."""
        if not package:
            return sys.executable
        pinned = f"{package}=={PACKAGES[package]}"
        folder = self._folder / pinned
        interpreter, complete = folder / "bin" / "python", folder / "complete"
        if complete.exists():
            return str(interpreter)
        venv.create(folder, clear=True)
        paths = sysconfig.get_path("purelib", vars={"base": str(folder)})
        Path(paths, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
        command += ["--disable-pip-version-check", "-c", str(self._constraints), pinned]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"not installed: {last_line(done.stderr)}")
        complete.touch()
        return str(interpreter)


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:120] if lines else "no message"


def run(
    way: Way,
    script: str,
    file: Path,
    options: list[str],
    environments: Environments,
    noted: dict[str, Any],
) -> None:
    """Run a way once, in a process of its own, and note what it took or why it failed."""
    if way.failure:
        return
    try:
        interpreter = environments.interpreter(way.package)
    except RuntimeError as error:
        way.failure = str(error)
        return
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["OMP_NUM_THREADS"] = options[options.index("--threads") + 1]
    if not way.package:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(RUNNERS.parent.parent), environment.get("PYTHONPATH", "")]
        )
    command = [interpreter, str(RUNNERS / script), way.function, str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        way.failure = f"failed: {last_line(done.stderr)}"
        print(done.stderr[-2000:], file=sys.stderr, flush=True)
        return
    took = json.loads(done.stdout.splitlines()[-1]) | noted
    way.runs.append(took)
    numbers = (f"{key} {took[key]:.3g}" for key in ("wall", "processor", "memory"))
    print(way.title, *options, *numbers, file=sys.stderr, flush=True)


def align(arguments: argparse.Namespace, folder: Path, environments: Environments) -> None:
    key = "processor" if arguments.threads == 1 else "wall"
    threads = ["--threads", str(arguments.threads)]
    for network in arguments.networks.split(","):
        name, _, size = network.partition(":")
        file = folder / f"{name}-{size}.safetensors"
        if not file.exists():
            write = [sys.executable, str(RUNNERS / "given.py"), name, size, str(IMAGES), str(file)]
            subprocess.run(write, check=True)
        ways = alignments()
        try:
            for number in range(arguments.rounds):
                for way in ways:
                    batches = way.batches if number == 0 else way.fastest(key)
                    for batch in batches:
                        options = ["--images", str(way.images), "--batch", str(batch), *threads]
                        run(way, "run_alignment.py", file, options, environments, {"batch": batch})
        finally:
            print_alignments(f"{name} at {size} x {size}", ways, load_file(file), key)


def print_alignments(title: str, ways: list[Way], given: dict[str, np.ndarray], key: str) -> None:
    print(f"\nAlignment, {title}, {loads()}")
    print(f"{'':<22}{'images / s':>11}{'x ours':>8}{'MiB':>7}{'error':>10}{'batch':>7}  left out")
    for way in ways:
        if way.failure or not way.runs:
            print(f"{way.title:<22}  {way.failure or 'not run'}", flush=True)
            continue
        best, ours = way.best(key), ways[0].best(key)
        ratio = best[key] / way.images / (ours[key] / ways[0].images)
        exact = given["exact_without_norm" if way.left_out else "exact"]
        difference = np.abs(np.array(best["result"]) - exact[: way.images]).max()
        memory = min(one["memory"] for one in way.runs if one["batch"] == best["batch"])
        print(
            f"{way.title:<22}{way.images / best[key]:>11.2f}{ratio:>8.1f}{memory / 2**20:>7.0f}"
            f"{difference / np.abs(exact[: way.images]).max():>10.1e}{best['batch']:>7}"
            f"  {way.left_out}",
            flush=True,
        )


def select(arguments: argparse.Namespace, folder: Path, environments: Environments) -> None:
    for samples in SIZES:
        file = folder / f"scores-{samples}.npz"
        draw = np.random.default_rng(0)
        np.savez(
            file,
            score=draw.normal(size=samples).astype(np.float32),
            label=draw.integers(1000, size=samples).astype(np.int32),
            keep=KEEP,
            cutoff=CUTOFF,
            strata=STRATA,
        )
        ways = selections()
        take_turns(ways, file, arguments, environments)
        title = f"Selection, {samples:,} samples, keep {KEEP:g}, {loads()}"
        print_arrays(title, ways, arguments, "kept", lambda result: f"{len(result):,}")


def extrapolate(arguments: argparse.Namespace, folder: Path, environments: Environments) -> None:
    draw = np.random.default_rng(0)
    centres = 0.05 * draw.standard_normal((100, WIDTH), np.float32)
    embedding = centres[draw.integers(100, size=SAMPLES)]
    embedding += 0.03 * draw.standard_normal((SAMPLES, WIDTH), np.float32)
    arrays = {"scored": embedding[:SCORED], "rest": embedding[SCORED:]}
    arrays["score"] = draw.standard_normal(SCORED).astype(np.float32)
    file = folder / "embeddings.npz"
    np.savez(file, **arrays)
    exact = exact_neighbours(*(arrays[name].astype(float) for name in ("rest", "scored", "score")))
    ways = extrapolations()
    take_turns(ways, file, arguments, environments)
    print_arrays(
        f"kNN extrapolation, {SAMPLES:,} samples of width {WIDTH}, {SCORED:,} scored, {loads()}",
        ways,
        arguments,
        "error",
        lambda result: f"{np.abs(result[:CHECKED] - exact).max() / np.abs(exact).max():.1e}",
    )


def exact_neighbours(rest: np.ndarray, scored: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return what kNN as published predicts for the first rows, in float64."""
    predicted = []
    for query in rest[:CHECKED]:
        distance = np.sqrt(np.square(scored - query).sum(1))
        near = np.argsort(distance, kind="stable")[:20]
        weight = np.exp(-distance[near])
        predicted.append((weight * score[near]).sum() / weight.sum())
    return np.array(predicted)


def take_turns(
    ways: list[Way], file: Path, arguments: argparse.Namespace, environments: Environments
) -> None:
    for _ in range(arguments.rounds):
        for way in ways:
            options = ["--threads", str(arguments.threads)]
            run(way, "run_arrays.py", file, options, environments, {})


def print_arrays(
    title: str, ways: list[Way], arguments: argparse.Namespace, name: str, describe: Any
) -> None:
    key = "processor" if arguments.threads == 1 else "wall"
    print(f"\n{title}\n{'':<22}{'seconds':>11}{'x ours':>8}{'MiB':>7}{name:>10}")
    ours: dict[str, float] = {}
    for way in ways:
        if way.failure:
            print(f"{way.title:<22}  {way.failure}", flush=True)
            continue
        best, kind = way.best(key), way.title.partition(":")[0] if ":" in way.title else ""
        ours.setdefault(kind, best[key])
        result = np.load(best["result"])
        memory = min(one["memory"] for one in way.runs)
        print(
            f"{way.title:<22}{best[key]:>11.3f}{best[key] / ours[kind]:>8.1f}"
            f"{memory / 2**20:>7.0f}{describe(result):>10}",
            flush=True,
        )


def loads() -> str:
    return "load " + ", ".join(f"{value:.1f}" for value in os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="alignment,selection,knn", help="names with commas")
    parser.add_argument("--networks", default=NETWORKS, help="names and sizes of images")
    parser.add_argument("--dir", type=Path, help="where environments and inputs are kept")
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {version}" for name, version in PACKAGES.items())
    torch = importlib.metadata.version("torch")
    times = "processor time" if arguments.threads == 1 else "wall time"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} thread(s), {times}")
    print(f"torch {torch}, {versions}; float32, least of {arguments.rounds} rounds")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    kinds = {"alignment": align, "selection": select, "knn": extrapolate}
    with contextlib.ExitStack() as stack:
        folder = arguments.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        environments = Environments(folder)
        for name in arguments.only.split(","):
            kinds[name](arguments, folder, environments)


if __name__ == "__main__":
    main()
