"""Whether two complete runs give the same scores: other seed set, proxies, batches and fits, same data and settings.

    python benchmarks/agreement.py [--dir ../shared/data/cifar10] [--fractions 0.2,0.1] [--variants loss,moso] [--seeds 1,2]

Prints for every pair of seeds the Spearman correlation of the two `scores/` over all samples and within classes, over the samples that neither
run measured, the overlap of the keep-lists at 0.3, 0.5 and 0.7, and what each run says of itself (stability, fidelity), with its processor time.
Without --dir: the bundled digits. Runs are kept below --cache, so that `membership.py` can read them; a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from common import names_of, shares_of
from scipy.stats import rankdata, spearmanr

import raypipe
from raypipe import storage
from raypipe.runs.ledger import fingerprint
from raypipe.runs.run import Run

VARIANTS: dict[str, dict[str, Any]] = {
    "loss": {"measure.scores": ["loss"]},
    "el2n": {"measure.scores": ["el2n"]},
    "entropy": {"measure.scores": ["entropy"]},
    "moso": {"measure.scores": ["moso"]},
    "grand": {"measure.scores": ["grand"]},
    "moso-normalized": {"measure.scores": ["moso"], "measure.moso.weights": "normalized"},
    # as it was before cross-fitting: one proxy, in-sample scores
    "moso-one-proxy": {"measure.scores": ["moso"], "proxy.parts": 1},
    "loss-one-proxy": {"measure.scores": ["loss"], "proxy.parts": 1},
    "el2n-one-proxy": {"measure.scores": ["el2n"], "proxy.parts": 1},
}
OF_THE_TRAINING = ("aum", "dual", "dynamic-uncertainty", "forgetting", "tdds")
"""Scores of one run that measures all of them: it extrapolates one after the other."""
VARIANTS |= {
    score: {"measure.scores": list(OF_THE_TRAINING), "extrapolate.score": score}
    for score in OF_THE_TRAINING
}
KEEP = (0.3, 0.5, 0.7)
INCLUDE = "train-0000[01]*"
"""Files of the folder that are read by default: 10,000 images of CIFAR."""


def config(
    arguments: argparse.Namespace, variant: str, fraction: float, seed: int
) -> dict[str, Any]:
    """The configuration of one run; `seed` decides everything that is random in it."""
    name = os.path.basename(os.path.normpath(arguments.dir)) if arguments.dir else "digits"
    of = "training" if variant in OF_THE_TRAINING else variant
    if arguments.dir and arguments.include != INCLUDE:
        name += f"-{fingerprint(arguments.include)[:8]}"
    uri = os.path.join(arguments.cache, f"{name}-{of}-{fraction:g}-{arguments.epochs}-{seed}")
    if arguments.dir:
        source = {
            "uri": os.path.abspath(arguments.dir),
            "format": "parquet",
            "include": arguments.include,
        }
        proxy = {"image_size": 32, "batch_size": 32, "lr": 0.05}
    else:
        source = {"uri": "digits://", "format": "digits", "fragment_samples": 256}
        proxy = {"image_size": 16, "batch_size": 32, "lr": 0.05, "flip": False, "crop_padding": 1}
    result: dict[str, Any] = {
        "run": uri,
        "source": source,
        "seed": {"fraction": fraction, "seed": seed},
        "proxy": {"model": "small", "epochs": arguments.epochs, "seed": seed, **proxy},
        "measure": {},
        "extrapolate": {"seed": seed, "judge_published": False},
        "select": {"seed": seed, "keep": list(KEEP), "strategy": "ccs"},
        "trust": {"min_spearman": -1, "min_stability": -1, "min_accuracy_over_chance": -1},
    }
    for key, value in VARIANTS[variant].items():
        *sections, last = key.split(".")
        section = result
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return result


def run_of(settings: dict[str, Any]) -> Run:
    """The finished run of a configuration."""
    run = Run(settings["run"])
    finished = storage.exists(run.ledger_file) and "report" in run.ledger()
    score = settings["extrapolate"].get("score")
    if (
        not finished
        or run.ledger()["report"].state != "done"
        or score not in (None, run.config().score)
    ):
        raypipe.run(settings, overwrite=True)
    return run


def scores_of(run: Run) -> pa.Table:
    """sample_id, label, score and measured of every sample, sorted by id."""
    columns = ["sample_id", "label", "score", "measured"]
    tables = [table.select(columns) for _, table in storage.iter_tables(run.scores_folder)]
    return pa.concat_tables(tables).sort_by("sample_id")


def within(a: np.ndarray, b: np.ndarray, label: np.ndarray) -> float:
    """Mean Spearman correlation within classes, by their size."""
    found = [
        (spearmanr(a[label == y], b[label == y])[0], (label == y).sum()) for y in np.unique(label)
    ]
    values, weights = np.array(found).T
    return float(np.average(values[np.isfinite(values)], weights=weights[np.isfinite(values)]))


def kept(run: Run, keep: float) -> set[str]:
    return set(
        storage.read_table(run.keep_list(f"keep-{keep:.2f}.parquet"))["sample_id"].to_pylist()
    )


def described(run: Run) -> str:
    """What a run says of itself."""
    records = run.ledger()
    detail = records["extrapolate"].detail
    stable, fidelity = detail["stability"].get("value"), detail["fidelity"].get("spearman")
    seconds = sum(record.cpu_seconds for record in records.values())
    accuracy = records["proxy"].detail["accuracy"]
    figures = [f"{value:.3f}" if value is not None else "-" for value in (stable, fidelity)]
    return f"stability {figures[0]}, fidelity {figures[1]}, proxy accuracy {accuracy:.2f} in training, {seconds:.0f} processor s"


def compare(first: Run, second: Run) -> str:
    a, b = scores_of(first), scores_of(second)
    assert a["sample_id"].equals(b["sample_id"])
    x, y, label = a["score"].to_numpy(), b["score"].to_numpy(), a["label"].to_numpy()
    lists = [(kept(first, keep), kept(second, keep)) for keep in KEEP]
    overlap = " ".join(f"{len(one & two) / len(one):.3f}" for one, two in lists)
    classes = np.unique(label)
    means = [np.array([rankdata(z)[label == c].mean() for c in classes]) for z in (x, y)]
    return (
        f"all {spearmanr(x, y)[0]:.3f}   within classes {within(x, y, label):.3f}   "
        f"class means {spearmanr(*means)[0]:.3f}   overlap at {KEEP} {overlap}"
    )


def study(
    arguments: argparse.Namespace, variant: str, fraction: float, seeds: Sequence[int]
) -> None:
    runs = [run_of(config(arguments, variant, fraction, seed)) for seed in seeds]
    print(f"\n{variant}, seed set {fraction:.0%}, {arguments.epochs} epochs", flush=True)
    for seed, run in zip(seeds, runs):
        print(f"  run {seed}: {described(run)}", flush=True)
    for (i, first), (j, second) in itertools.combinations(zip(seeds, runs), 2):
        print(f"  runs {i} and {j}: {compare(first, second)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", help="folder of Parquet files; default: the bundled digits")
    parser.add_argument(
        "--include", default=INCLUDE, help="files of the folder: 10,000 images of CIFAR"
    )
    parser.add_argument("--fractions", default="0.2,0.1")
    parser.add_argument("--variants", default="loss", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--cache", default="/tmp/raypipe-agreement")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores; {arguments.dir or 'digits'}")
    for variant, fraction in itertools.product(
        names_of(arguments.variants), shares_of(arguments.fractions)
    ):
        study(arguments, variant, fraction, [int(seed) for seed in arguments.seeds.split(",")])


if __name__ == "__main__":
    main()
