"""What a whole run costs, stage by stage, beside scoring everything, a plain script, and the least that it could cost.

    python benchmarks/pipeline.py DATA --dir FOLDER [--samples 10000] [--parts pipeline,full,script,floor] [--threads 2]

The run is one with a predicted score, MoSo, and one proxy: what a script can do as well. `versions.py` measures a default run.
DATA is a folder of Parquet files (settings of jobs/configs/cifar10.yaml), or of tars (`--repeat 105` makes 20,160 images of 192: each tar
is linked so often; images are brought to --size pixels). In one table:

    pipeline  `raypipe run` in a process of its own, with a Ray of its own on all cores of this machine
    full      the same with all samples in the seed set, until they are measured: there is nothing to predict then
    script    the same mathematics in one process of torch, without Ray and without files between stages (`pipeline_plain.py`)
    floor     of the script: one decoding and one forward pass for each image, and the training of the proxy

Processor seconds are of every process that the command starts: the driver, raypipe's workers, and what Ray starts for itself. They are
attributed to the stage that the ledger says is running ("start": before the first; "end": after the last), and hold what the ledger's own
cannot see, such as the start of workers.
Those of the script are told by the process itself. Wall-clock seconds mean something on a machine with nothing else to do.
Memory is the resident set without shared memory; of all workers together what each has for itself, at one time.

Each part is measured once and kept in --dir: stopped at any time, the same command goes on with the parts that are missing. --parts names
what may be measured; what is there is in the table in any case.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from common import names_of
from pipeline_watch import DRIVER, RAY, WORKER, watch

from raypipe import storage
from raypipe.config import dump_config, load_config
from raypipe.runs.ledger import fingerprint

HERE = Path(__file__).resolve().parent
PARTS = ("pipeline", "full", "script", "floor")
STAGES = (
    "start",
    "index",
    "seed",
    "decode",
    "proxy",
    "measure",
    "embed",
    "extrapolate",
    "select",
    "report",
    "end",
)
"""Of a run and of the script, in the order of the table."""
OF_FLOOR = ("decode", "proxy", "embed")
TO_REACH = {"full": 0.30, "floor": 1.25, "script": 1.15}
"""The pipeline's processor seconds as a share of another part's, at most."""
MOST_MEMORY = 1.5e9
"""Of the driver."""


def config_of(arguments: argparse.Namespace, folder: Path, part: str) -> Any:
    """The settings of one part."""
    data = os.path.abspath(arguments.data)
    source = {"uri": data, "include": "train-*", "limit": arguments.samples}
    if arguments.repeat:
        source = {
            "uri": str(_repeated(data, folder, arguments.repeat)),
            "limit": arguments.samples,
            "format": "webdataset",
            "include": "*",
        }
        source |= {"image_column": "auto", "label_column": "auto", "num_classes": 1000}
    given = {
        "run": str(folder / "run" / part),
        "source": source,
        "proxy": {
            "model": arguments.model,
            "image_size": arguments.size,
            "epochs": arguments.epochs,
            "parts": 1,
            "batch_size": 128,
            "progressive_resizing": False,
        },
        "measure": {"scores": ["moso"]},
        "select": {"strategy": "ccs"},
        "cluster": {"address": "local"},
        "trust": {"min_spearman": -1, "min_stability": -1, "min_accuracy_over_chance": -1},
    }
    if part == "full":
        given["seed"] = {"fraction": 1.0}
    overrides = [
        f"{section}={json.dumps(values)}"
        if not isinstance(values, dict)
        else f"{section}.{name}={json.dumps(value)}"
        for section, values in given.items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
        if value is not None
    ]
    return load_config(
        str(HERE.parent / "jobs" / "configs" / "cifar10.yaml"), [*overrides, *arguments.set]
    )


def _repeated(data: str, folder: Path, times: int) -> Path:
    """A folder with so many links to each tar: as many samples of other names."""
    place = folder / f"tars-{times}"
    place.mkdir(parents=True, exist_ok=True)
    for tar in sorted(Path(data).glob("*.tar")):
        for number in range(times):
            link = place / f"{tar.stem}-{number:04d}.tar"
            if not link.is_symlink():
                link.symlink_to(tar)
    return place


def measure(part: str, arguments: argparse.Namespace, folder: Path, file: Path) -> None:
    """Run one part and write what it took."""
    config = config_of(arguments, folder, part)
    settings, log = folder / f"{part}.yaml", str(folder / f"{part}.log")
    settings.write_text(dump_config(config))
    print(f"{part}: {log}", flush=True)
    if part in ("script", "floor"):
        command = [
            sys.executable,
            str(HERE / "pipeline_plain.py"),
            str(settings),
            str(file) + ".new",
            f"--threads={arguments.threads}",
        ]
        with open(log, "w") as output:
            subprocess.run(
                command + ["--floor"] * (part == "floor"),
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
            )
        os.replace(str(file) + ".new", file)
        return
    shutil.rmtree(config.run, ignore_errors=True)
    command = [sys.executable, "-m", "raypipe.cli", "run", str(settings)] + ["--until=measure"] * (
        part == "full"
    )
    code, taken = watch(command, log, lambda: running(config.run))
    if code:
        sys.exit(f"the run of {part} ended with {code}: see {log}")
    ledger = storage.read_json(os.path.join(config.run, "run.json"))["stages"]
    told = {
        name: {key: record[key] for key in ("samples", "wall_seconds", "cpu_seconds")}
        for name, record in ledger.items()
    }
    result = taken.as_dict() | {"ledger": told, "samples": config.source.limit}
    if part == "pipeline":
        figures = ledger["extrapolate"]["detail"]
        result |= {
            "samples": ledger["embed"]["samples"],
            "measured": ledger["seed"]["samples"],
            "spearman": figures["fidelity"]["spearman"],
        }
        result["report"] = os.path.getsize(os.path.join(config.run, "report", "index.html"))
    storage.write_json(str(file), result)


def running(run: str) -> str:
    """The stage that the ledger of a run says is running."""
    try:
        stages = json.loads(Path(run, "run.json").read_bytes())["stages"]
    except (OSError, ValueError):
        return "start"
    return next(
        (name for name, record in stages.items() if record["state"] == "running"),
        "end" if stages else "start",
    )


def seconds_of(part: str, found: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """Processor seconds of a part by stage; None where they are not known. Those of the floor are in the script's."""
    if part == "floor" and part not in found and "script" in found:
        return {name: found["script"]["seconds"][name] for name in OF_FLOOR}
    if part not in found:
        return None
    given = found[part]["seconds"]
    return {
        name: sum(value.values()) if isinstance(value, dict) else value
        for name, value in given.items()
    }


def table(found: dict[str, dict[str, Any]]) -> None:
    """Print everything."""
    known = {part: seconds_of(part, found) for part in PARTS}
    seconds = {part: values for part, values in known.items() if values is not None}
    wall = {part: found[part]["wall"] for part in ("pipeline", "full", "script") if part in found}
    parts = list(seconds)
    run = found.get("pipeline")
    print("\nprocessor seconds" + " " * 29 + "in the pipeline" + " " * 18 + "wall seconds")
    kinds = (DRIVER, WORKER, RAY, "ledger") if run else ()
    print(
        f"{'':<12}"
        + "".join(f"{name:>10}" for name in (*parts, *kinds))
        + "".join(f"{name:>10}" for name in wall)
    )
    names = [name for name in STAGES if any(name in seconds[part] for part in parts)]
    names += sorted({name for part in parts for name in seconds[part]} - set(names))
    for name in names:
        cells = [seconds[part].get(name) for part in parts]
        if run:
            told = run["ledger"].get(name, {}).get("cpu_seconds")
            cells += [run["seconds"].get(name, {}).get(kind) for kind in kinds[:-1]] + [told]
        print(
            f"{name:<12}"
            + "".join(
                _number(cell) for cell in [*cells, *(values.get(name) for values in wall.values())]
            )
        )
    sums = [sum(seconds[part].values()) for part in parts]
    if run:
        sums += [
            sum(values.get(kind, 0.0) for values in run["seconds"].values()) for kind in kinds[:-1]
        ]
        sums.append(sum(record["cpu_seconds"] for record in run["ledger"].values()))
    print(
        f"{'all':<12}"
        + "".join(
            _number(cell) for cell in [*sums, *(sum(values.values()) for values in wall.values())]
        )
    )
    each = [found.get(part if part in found else "script", {}).get("samples") for part in parts]
    print(
        f"{'ms / image':<12}"
        + "".join(
            _number(1e3 * total / count if count else None) for total, count in zip(sums, each)
        )
    )
    print(
        f"{'images / s':<12}"
        + " " * 10 * len(sums)
        + "".join(
            _number(found[part]["samples"] / sum(values.values())) for part, values in wall.items()
        )
    )
    if run:
        _memory(found)
        _processes(run)
    _reached(dict(zip(parts, sums)), run)


def _memory(found: dict[str, dict[str, Any]]) -> None:
    print(
        f"\n{'peak memory, MB':<32}"
        + "".join(f"{part:>10}" for part in ("pipeline", "full") if part in found)
    )
    for name in (DRIVER, "largest worker", WORKER, RAY, "object store"):
        title = {WORKER: "all workers, their own", RAY: "Ray's processes, their own"}.get(
            name, name
        )
        values = [
            found[part]["memory"].get(name, 0) / 1e6
            for part in ("pipeline", "full")
            if part in found
        ]
        print(f"{title:<32}" + "".join(f"{value:>10,.0f}" for value in values))
    if "script" in found:
        print(f"{'the script':<32}{found['script']['memory'] / 1e6:>10,.0f}")


def _processes(run: dict[str, Any]) -> None:
    """Workers by the stage in which they were started, and the last that each did."""
    workers = [one for one in run["processes"] if one["kind"] == WORKER]
    print(f"\n{len(workers)} worker processes were started, {len(run['processes'])} in all")
    for stage in STAGES:
        here = Counter(_did(one["title"]) for one in workers if one["stage"] == stage)
        if here:
            print(
                f"  {stage:<12}"
                + ", ".join(f"{count} x {title}" for title, count in here.most_common())
            )


def _did(title: str) -> str:
    """Of the title of a worker, without arguments and padding."""
    return (
        title.split("(")[0].strip().removeprefix("ray::")
        if title.startswith("ray::")
        else "nothing"
    )


def _reached(sums: dict[str, float], run: dict[str, Any] | None) -> None:
    print()
    for part, most in TO_REACH.items():
        if "pipeline" in sums and part in sums:
            ratio = sums["pipeline"] / sums[part]
            print(
                f"pipeline / {part:<8} {ratio:6.3f}  to reach: {most:.2f}  {'reached' if ratio <= most else 'NOT reached'}"
            )
        else:
            print(f"pipeline / {part:<8}      -  to reach: {most:.2f}  not measured")
    if run:
        memory = run["memory"][DRIVER]
        print(
            f"memory of driver    {memory / 1e9:5.2f} GB  to reach: 1.50  {'reached' if memory < MOST_MEMORY else 'NOT reached'}"
        )


def _number(value: float | None) -> str:
    return f"{'':>10}" if value is None else f"{value:>10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--dir", required=True, help="where results are kept, and runs are written")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the script")
    parser.add_argument("--epochs", type=int, default=30, help="of the proxy")
    parser.add_argument("--model", default="small", help="the proxy")
    parser.add_argument("--size", type=int, default=32, help="pixels that images are brought to")
    parser.add_argument(
        "--repeat", type=int, default=0, help="DATA is a folder of tars, each to be read so often"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="any other setting; may be repeated",
    )
    arguments = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("stopped")
    )  # so that what it started is stopped as well
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("dir", "parts", "threads")
    }
    folder = (
        Path(arguments.dir).resolve()
        / f"{Path(arguments.data).name}-{arguments.samples}-{fingerprint(given)[:6]}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = names_of(arguments.parts)
    for part in wanted:
        if part not in PARTS:
            sys.exit(f"{part!r} is not one of {', '.join(PARTS)}")
        file = folder / f"{part}.json"
        if not file.exists() and not (part == "floor" and (folder / "script.json").exists()):
            measure(part, arguments, folder, file)
    found = {
        part: json.loads((folder / f"{part}.json").read_text())
        for part in PARTS
        if (folder / f"{part}.json").exists()
    }
    with open("/proc/cpuinfo") as cpu:
        model = next(
            (line.split(":")[1].strip() for line in cpu if line.startswith("model name")), "?"
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray"))
    print(f"{platform.machine()}, {model}, {os.cpu_count()} cores; {versions}")
    proxy = yaml.safe_load(dump_config(config_of(arguments, folder, "pipeline")))["proxy"]
    print(
        f"{arguments.samples:,} images of {Path(arguments.data).name}; {proxy['model']} at {proxy['image_size']} pixels, {proxy['epochs']} epochs, ",
        end="",
    )
    print(
        f"{proxy['checkpoints']} checkpoints{''.join(f'; {one}' for one in arguments.set)}; script on {arguments.threads} threads",
        end="",
    )
    print(
        "".join(
            f"; Spearman {part} {found[part]['spearman']:.3f}"
            for part in ("pipeline", "script")
            if found.get(part, {}).get("spearman")
        )
    )
    table(found)


if __name__ == "__main__":
    main()
