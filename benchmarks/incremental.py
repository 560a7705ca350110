"""What a night costs beside the whole: processor seconds of embed and extrapolate for everything, and for a per cent more.

    python benchmarks/incremental.py --samples 6000 --folder /tmp/incremental

Makes Parquet files of synthetic JPEGs, runs the whole job over them, and then, in the same Ray cluster on this machine,

    full       embed, as it was in that job, and every score once more with the extrapolator that is fitted: no fit is in it
    first      the first night: nothing new; the samples that drift is judged by are drawn, and the first snapshot is made
    nothing    a night with nothing new
    constant   a night with 8 new samples: what every night with anything new costs, however little
    +1 %, ...  nights with so many new samples
    audit      once more as many as in the last, with the default audit: its images are measured at every checkpoint

Two figures each: `stages` is what the ledger says of embed and extrapolate; `everything` is of this process and of Ray's workers: the
start of workers, keep-lists, drift and snapshot included. Reports are not written. Left out is what Ray's own services take with time.
With --alone there is no Ray: units are worked off one after the other in this process, with a small proxy of a few steps, as in the tests of
nights. What is left out is the start of workers, and the constant is smaller by it.

margin = 3 % of full for each per cent + constant - cost, which is to be positive.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa

import raypipe
from raypipe import storage
from raypipe.config import Config, SourceSettings, parse_config
from raypipe.nightly import run_night
from raypipe.progress import Progress
from raypipe.runs.run import Run
from raypipe.sources import open_source

ROWS = 1000
FEW = 8
BOUND = 3.0
"""Per cent of the full cost that a per cent more may cost, beside the constant."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="pixels of an image")
    parser.add_argument("--method", default="gnn")
    parser.add_argument(
        "--grow", type=float, nargs="+", default=[1.0, 1.0, 4.0], help="per cent that nights add"
    )
    parser.add_argument("--folder", required=True, help="a new folder; the run in it is left there")
    parser.add_argument("--alone", action="store_true", help="without Ray, in this process")
    options = parser.parse_args()
    if options.alone:
        import pytest

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        from nights import in_process

        in_process(pytest.MonkeyPatch())
        options.model = "small"
    folder = Path(options.folder)
    config = settings(folder, options)
    run, quiet = Run(config.run), Progress(quiet=True)
    end = write(folder, 0, options.samples, options.size)
    raypipe.run(config, until="measure", progress=quiet)
    print(
        f"{options.samples:,} samples of {options.size} x {options.size}, {options.model}, {options.method}; seconds of processor"
    )
    print(
        f"{'':<12}{'samples':>9}{'stages':>10}{'everything':>12}{'margin':>10}{'% of full':>11}",
        flush=True,
    )

    def embed() -> int:
        raypipe.run(config, until="embed", progress=quiet)
        return options.samples

    def score() -> int:
        storage.delete(run.path("scores"))
        raypipe.run(config, until="extrapolate", progress=quiet)
        return options.samples

    full = line("embed", run, embed)
    raypipe.run(config, until="select", progress=quiet)
    full += line("scores", run, score)
    raypipe.run(config, until="select", progress=quiet)
    print(f"{'full':<12}{options.samples:>9,}{'':>10}{full:>12.2f}", flush=True)

    def night(count: int, audit: int = 0) -> Callable[[], int]:
        def do() -> int:
            given = config.nightly.model_copy(update={"audit": audit})
            done = run_night(config.model_copy(update={"nightly": given}), progress=quiet)
            assert done.manifest["samples"]["new"] == count or not done.wrote_snapshot
            return count

        return do

    line("first", run, night(0))
    line("nothing", run, night(0))
    end = write(folder, end, FEW, options.size)
    constant = line("constant", run, night(FEW))
    for percent in options.grow:
        count = round(options.samples * percent / 100)
        end = write(folder, end, count, options.size)
        line(f"+{percent:g} %", run, night(count), percent, full, constant)
    write(folder, end, count, options.size)
    line("audit", run, night(count, 200), percent, full, constant)


def settings(folder: Path, options: argparse.Namespace) -> Config:
    return parse_config(
        {
            "run": str(folder / "run"),
            "source": {"uri": str(folder / "data"), "format": "parquet", "fragment_samples": ROWS},
            "seed": {"fraction": 0.05},
            "proxy": {
                "model": options.model,
                "image_size": options.size,
                "epochs": 1 if options.alone else 2,
                "checkpoints": 1,
            },
            "measure": {"scores": ["loss"], "loss": {"at": "checkpoints"}, "recalibrate": False},
            "extrapolate": {
                "method": options.method,
                "folds": 1,
                "judge_published": False,
                "epochs": 2,
            },
            "trust": {"min_spearman": -1, "min_accuracy_over_chance": -1},
            "select": {"keep": [0.5]},
            "report": {"images": 0},
            "cluster": {"address": "local"},
        }
    )


def write(folder: Path, start: int, count: int, size: int) -> int:
    """Files of samples `start` to `start + count` of a synthetic source; returns the end."""
    end = start + count
    source = open_source(
        SourceSettings(
            uri=f"synthetic://?samples={end}&size={size}&encoded=jpeg", fragment_samples=ROWS
        )
    )
    rows: list[dict[str, object]] = []
    for fragment in (part for file in source.files() for part in source.scan(file).fragments):
        if fragment.stop <= start:
            continue
        for number, sample in zip(
            range(fragment.start, fragment.stop), source.read(fragment), strict=True
        ):
            if number >= start:
                rows.append({"image": {"bytes": sample.image}, "label": int(sample.label or 0)})
    for first in range(0, len(rows), ROWS):
        table = pa.Table.from_pylist(rows[first : first + ROWS])
        storage.write_table(str(folder / "data" / f"part-{start + first:09d}.parquet"), table)
    return end


def line(
    name: str,
    run: Run,
    work: Callable[[], int],
    percent: float = 0.0,
    full: float = 0.0,
    constant: float = 0.0,
) -> float:
    """Do something and print what it cost; returns all processor seconds."""
    before, watch = of_stages(run), Watch()
    samples = work()
    stages, everything = of_stages(run) - before, watch.stop()
    text = f"{name:<12}{samples:>9,}{stages:>10.2f}{everything:>12.2f}"
    if percent:
        margin = BOUND / 100 * full * percent + constant - everything
        text += f"{margin:>10.2f}{100 * (everything - constant) / full / percent:>10.2f} "
    print(text, flush=True)
    return everything


def of_stages(run: Run) -> float:
    stages = json.loads(storage.read_bytes(run.path("run.json")))["stages"]
    return sum(stages[name]["cpu_seconds"] for name in ("embed", "extrapolate") if name in stages)


class Watch:
    """Processor seconds of this process and Ray's workers from now on; looks twice a second, since workers end."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._own, self._over = 0.0, threading.Event()
        self._look()
        self._first, self._driver = dict(self._seen), time.process_time()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        self._look()
        workers = sum(seconds - self._first.get(key, 0.0) for key, seconds in self._seen.items())
        return workers + time.process_time() - self._driver - self._own

    def _go_on(self) -> None:
        started = time.thread_time()
        while not self._over.wait(0.5):
            self._look()
        self._own = time.thread_time() - started

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[0].startswith("ray::") or "default_worker.py" in " ".join(
                    process.cmdline()
                ):
                    times = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = times.user + times.system
            except (psutil.Error, IndexError):
                continue


if __name__ == "__main__":
    main()
