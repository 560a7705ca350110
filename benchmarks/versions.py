"""What a default run costs in this version of raypipe and in another one, side by side.

    git worktree add ../before 03dd891
    python benchmarks/versions.py DATA [../before] --dir FOLDER [--samples 10000] [--rounds 3] [--set proxy.repeats=4] [--repeat 105]

DATA is a folder of Parquet files or, with --repeat, of tars, each of which is read so often under other names. Each version runs the whole pipeline
with the settings of its own jobs/configs/cifar10.yaml; --set changes them for this version only. Rounds alternate between the versions, and each has
seeds of its own. --neighbours are processes that keep a core busy meanwhile. Printed are means over the rounds, with the lowest and the highest: processor seconds of every process that the command starts,
seconds of the clock, and the peak memory that all workers together have for themselves. Finished runs in --dir are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline_watch import WORKER, watch

HERE = Path(__file__).resolve().parent.parent
SEEDS = ("seed.seed", "proxy.seed", "extrapolate.seed", "select.seed")


def source_settings(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Settings of the source that both versions understand."""
    if not arguments.repeat:
        data = os.path.abspath(arguments.data)
        return [f"source.uri={data}", f"source.limit={arguments.samples}"]
    place = folder / f"tars-{arguments.repeat}"
    place.mkdir(parents=True, exist_ok=True)
    for tar in sorted(Path(arguments.data).resolve().glob("*.tar")):
        for number in range(arguments.repeat):
            link = place / f"{tar.stem}-{number:04d}.tar"
            if not link.is_symlink():
                link.symlink_to(tar)
    return [
        f"source.uri={place}",
        f"source.limit={arguments.samples}",
        "source.format=webdataset",
        "source.include=*",
        "source.image_column=auto",
        "source.label_column=auto",
        "source.num_classes=1000",
    ]


@contextmanager
def busy(neighbours: int) -> Iterator[None]:
    """Keep cores busy with other work."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]  # fmt: skip
    try:
        yield
    finally:
        for other in others:
            other.kill()


def run(checkout: Path, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the pipeline of a checkout, or read what it took."""
    result = folder / "taken.json"
    if result.exists():
        return json.loads(result.read_bytes())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gate = ["trust.min_spearman=-1", "cluster.address=local", f"run={folder / 'run'}"]
    command = [sys.executable, "-m", "raypipe.cli", "run", str(checkout / "jobs/configs/cifar10.yaml")]  # fmt: skip
    for setting in [*settings, *gate]:
        command += ["--set", setting]
    os.environ["PYTHONPATH"] = str(checkout)
    code, taken = watch(command, str(folder / "log"), lambda: "run")
    if code:
        sys.exit(f"the run of {checkout} ended with {code}: see {folder / 'log'}")
    figures = {
        "processor s": sum(taken.seconds["run"].values()),
        "wall s": taken.wall["run"],
        "workers, GB": taken.memory[WORKER] / 1e9,
    }
    ledger = json.loads((folder / "run" / "run.json").read_bytes())["stages"]
    figures["stages"] = {name: record["cpu_seconds"] for name, record in ledger.items()}
    result.write_text(json.dumps(figures))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("before", type=Path, nargs="?", help="checkout of the other version")
    parser.add_argument("--dir", type=Path, required=True, help="where runs are written")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--repeat", type=int, default=0, help="DATA has tars, each read so often")
    parser.add_argument("--neighbours", type=int, default=0)
    arguments = parser.parse_args()
    name = f"{Path(arguments.data).name}-{arguments.samples}-{arguments.neighbours}"
    folder = arguments.dir.resolve() / name
    source = source_settings(arguments, folder)
    versions = {"before": arguments.before.resolve()} if arguments.before else {}
    versions["now"] = HERE
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
    for number in range(1, arguments.rounds + 1):
        seeds = [f"{name}={number}" for name in SEEDS]
        for name, checkout in versions.items():
            changes = arguments.set if name == "now" else []
            place = folder / "-".join([name, *changes, str(number)])
            with busy(arguments.neighbours):
                taken[name].append(run(checkout, [*source, *seeds, *changes], place))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {arguments.samples:,} images of {Path(arguments.data).name}; "
          f"{arguments.rounds} rounds; {arguments.neighbours} busy neighbours{''.join(f'; {one}' for one in arguments.set)}\n")  # fmt: skip
    report(taken)


def report(taken: dict[str, list[dict[str, Any]]]) -> None:
    """Print the figures of the versions and their ratio."""
    compared = len(taken) > 1
    print(f"{'':<14}" + "".join(f"{name:>24}" for name in taken) + "  now / before" * compared)
    for name in ("processor s", "wall s", "workers, GB"):
        values = [[one[name] for one in ones] for ones in taken.values()]
        means = [sum(ones) / len(ones) for ones in values]
        cells = [f"{mean:.1f} ({min(ones):.1f}..{max(ones):.1f})" for mean, ones in zip(means, values)]  # fmt: skip
        ratio = f"{means[-1] / means[0]:>14.2f}" if compared else ""
        print(f"{name:<14}" + "".join(f"{cell:>24}" for cell in cells) + ratio)
    print("\nprocessor s by the ledgers, first round")
    for name in dict.fromkeys(name for ones in taken.values() for name in ones[0]["stages"]):
        cells = [f"{ones[0]['stages'].get(name, 0):.1f}" for ones in taken.values()]
        print(f"{name:<14}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
