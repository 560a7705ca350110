"""Which list is worth more than a random one: fresh networks trained on keep-lists of whole runs, compared with random lists of the same size.

    python benchmarks/pruning.py --dir ../shared/data/cifar100 [--lists 0.2.loss.ccs,...] [--keep 0.1,0.2,0.3,0.5,0.7] [--seeds 5]
                                 [--protocol epochs] [--minutes 30] [--only-cached]

Lists are named KIND.SCORE.STRATEGY, such as 0.2.loss.ccs. KIND is the size of the seed set of a whole raypipe run, or `measured`: the seed set is
everything. SCORE is a variant of `agreement.py`, STRATEGY one of CUTS below. Their lists are cut by `raypipe.select`. Besides:

    random            the same number of samples, drawn at random
    random-by-class   the same share of each class, drawn at random: what every list is compared with
    full              everything

Training seed s takes the scores of run 1 + s modulo --scoring-seeds; runs differ in all their seeds. Trainings on two lists with the same seed
have the same initial weights, so that differences are paired. Protocols: `epochs`, the same number of epochs, so that a list of a tenth costs a tenth;
`steps`, as many steps as everything would take. Tested on the whole test part.

Every training is kept below --cache by what decides its result: samples of the list, recipe, seed, steps. Stopped at any time, the same command
resumes. --minutes stops between two trainings, --only-cached prints the tables of what is stored. Trainings run in one process, runs on Ray.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import agreement
import numpy as np
import quick_training as quick
import torch
from common import Images, names_of, read_named, save, shares_of

import raypipe
from raypipe.config import SourceSettings
from raypipe.evaluation.figures import SeedInterval, paired_difference, pooled_margin, seed_interval
from raypipe.keeplists.dataset import KeepList
from raypipe.runs.ledger import fingerprint

FULL, RANDOM, BASE = "full", "random", "random-by-class"
CUTS: dict[str, dict[str, Any]] = {
    "ccs": {"strategy": "ccs"},
    "strata1": {"strategy": "ccs", "strata": 1},
    "ccs-cut0": {"strategy": "ccs", "hard_cutoff": 0.0},
    "ccs-cut0.1": {"strategy": "ccs", "hard_cutoff": 0.1},
    "ccs-cut0.3": {"strategy": "ccs", "hard_cutoff": 0.3},
    "ccs-cut0.5": {"strategy": "ccs", "hard_cutoff": 0.5},
    "beta": {"strategy": "beta", "by_class": True},
    "band": {"strategy": "band"},
    "coverage": {"strategy": "coverage"},
    "typical": {"strategy": "typical"},
    "d2": {"strategy": "d2"},
    "infomax": {"strategy": "infomax"},
    "moderate": {"strategy": "moderate", "by_class": True},
    "easy": {"strategy": "mixed", "easy_fraction": 1.0, "by_class": True},
    "top": {"strategy": "top", "by_class": True},
}
"""Strategies and their options for `raypipe.select`."""


@dataclass(frozen=True)
class Job:
    """One training: a list by name, a keep fraction, a seed and a protocol."""

    name: str
    keep: float
    seed: int
    protocol: str


class Data:
    """Images of both parts with the ids of the training samples, as raypipe's own reader gives them."""

    def __init__(self, arguments: Namespace) -> None:
        self.train, self.ids = self._part(arguments, arguments.include)
        self.test, _ = self._part(arguments, arguments.test_include)
        scaled = self.train.pixels.astype(np.float32) / 255
        statistics = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))
        self.train_pixels = quick.Pixels(self.train.pixels, *statistics)
        self.test_pixels = quick.Pixels(self.test.pixels, *statistics)
        self.row = {sample: row for row, sample in enumerate(self.ids)}

    @staticmethod
    def _part(arguments: Namespace, include: str) -> tuple[Images, list[str]]:
        what = fingerprint(os.path.abspath(arguments.dir), include)
        path = os.path.join(arguments.cache, f"pixels-{what}.npz")
        if not os.path.exists(path):
            source = SourceSettings(
                uri=os.path.abspath(arguments.dir), format="parquet", include=include
            )
            images, ids = read_named(source, 32)
            save(path, pixels=images.pixels, label=images.label, ids=np.array(ids),
                 classes=np.array(images.classes))  # fmt: skip
        with np.load(path) as stored:
            images = Images(stored["pixels"], stored["label"], int(stored["classes"]))
            return images, stored["ids"].tolist()


class Lists:
    """Rows of every list; those of runs are cut once."""

    def __init__(self, arguments: Namespace, data: Data) -> None:
        self.arguments, self.data = arguments, data

    def rows(self, job: Job) -> np.ndarray:
        """What a job is trained on, int64, ascending."""
        label = self.data.train.label
        random = np.random.default_rng([job.seed, 7])
        if job.name == FULL:
            return np.arange(len(label))
        if job.name == RANDOM:
            return np.sort(random.permutation(len(label))[: round(job.keep * len(label))])
        if job.name == BASE:
            order = random.permutation(len(label))
            members = [order[label[order] == y] for y in range(self.data.train.classes)]
            return np.sort(np.concatenate([own[: round(job.keep * len(own))] for own in members]))
        return self._cut(job)

    def _cut(self, job: Job) -> np.ndarray:
        kind, score, cut = self.parts(job.name)
        run = self.run_of(kind, score, job.seed)
        path = f"{run}-lists/{cut}-{job.keep:g}-{job.seed}.npz"
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            raypipe.select(run, job.keep, force=True, seed=job.seed, **CUTS[cut])
            kept = KeepList(os.path.join(run, "keep", f"keep-{job.keep:.2f}.parquet"))
            save(path, rows=np.sort([self.data.row[sample] for sample in kept.ids]))
        with np.load(path) as stored:
            return stored["rows"]

    def run_of(self, kind: str, score: str, seed: int) -> str:
        """A copy of the finished run, so that the lists of others stay what they are."""
        arguments = self.arguments
        fraction = 1.0 if kind == "measured" else float(kind)
        scoring = Namespace(
            dir=arguments.dir, include=arguments.include, cache=arguments.runs, epochs=arguments.scoring_epochs
        )  # fmt: skip
        settings = agreement.config(scoring, score, fraction, 1 + seed % arguments.scoring_seeds)
        copy = os.path.join(arguments.cache, f"lists-{os.path.basename(settings['run'])}")
        if not os.path.exists(copy):
            agreement.run_of(settings)
            shutil.copytree(settings["run"], f"{copy}.partial", dirs_exist_ok=True)
            os.replace(f"{copy}.partial", copy)
        return copy

    @staticmethod
    def parts(name: str) -> tuple[str, str, str]:
        """0.2.loss.ccs-cut0.1 -> 0.2, loss, ccs-cut0.1"""
        kind, rest = (
            ("measured", name[9:]) if name.startswith("measured.") else (name[:3], name[4:])
        )
        score, cut = rest.split(".", 1)
        return kind, score, cut


class Trainings:
    """All trainings of a table."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments, self.data = arguments, Data(arguments)
        self.lists = Lists(arguments, self.data)
        self.recipe = quick.Recipe(
            tuple(arguments.sizes), arguments.epochs, arguments.batch, arguments.rate,
            tuple(arguments.channels),
        )  # fmt: skip
        self._folder = os.path.join(arguments.cache, "trained")
        os.makedirs(self._folder, exist_ok=True)

    def jobs(self) -> Iterator[Job]:
        """Seed by seed, so that a table that is not full yet has few seeds rather than few lists."""
        arguments = self.arguments
        for seed, protocol in itertools.product(range(arguments.seeds), arguments.protocol):
            if not arguments.without_full:
                yield Job(FULL, 1.0, seed, "epochs")
            for keep, name in itertools.product(
                arguments.keep,
                [BASE, *([RANDOM] if arguments.plain_random else []), *arguments.lists],
            ):
                yield Job(name, keep, seed, protocol)

    def _path(self, job: Job) -> str:
        rows = self.lists.rows(job)
        what = fingerprint(
            os.path.abspath(self.arguments.dir), self.arguments.include, asdict(self.recipe), job.seed,
            self._steps(job) or 0, rows.tolist(),
        )  # fmt: skip
        return os.path.join(self._folder, f"{what}.json")

    def _steps(self, job: Job) -> int | None:
        return self.recipe.steps(len(self.data.train)) if job.protocol == "steps" else None

    def accuracy(self, job: Job) -> float | None:
        """None where it was not trained yet."""
        path = self._path(job)
        if not os.path.exists(path):
            return None
        with open(path) as file:
            return json.load(file)["accuracy"]

    def train(self, job: Job) -> None:
        data, began = self.data, time.process_time()
        rows, path = self.lists.rows(job), self._path(job)
        model = quick.fit(
            self.recipe, data.train_pixels, data.train.label, rows, data.train.classes, job.seed, self._steps(job)
        )  # fmt: skip
        right = quick.predictions(model, self.recipe, data.test_pixels) == data.test.label
        seconds = time.process_time() - began
        with open(f"{path}.partial", "w") as file:
            json.dump(
                {"accuracy": float(right.mean()), "samples": len(rows), "seconds": seconds}, file
            )
        os.replace(f"{path}.partial", path)
        print(
            f"{time.strftime('%H:%M:%S')}  {job.name:<28} {job.keep:<4g} {job.protocol:<6} {job.seed}  {right.mean():.4f}  {seconds:5.0f} s",
            flush=True,
        )


class Tables:
    """What is stored, in words."""

    def __init__(self, trainings: Trainings, protocol: str) -> None:
        arguments = trainings.arguments
        self.keep, self.protocol = arguments.keep, protocol
        self._of: dict[tuple[str, float], dict[int, float]] = {}
        for job in trainings.jobs():
            if job.protocol != protocol and job.name != FULL:
                continue
            accuracy = trainings.accuracy(job)
            if accuracy is not None:
                self._of.setdefault((job.name, job.keep), {})[job.seed] = accuracy
        names = dict.fromkeys(name for name, _ in self._of)
        self.lists = [name for name in names if name not in (FULL, BASE)]

    def of(self, name: str, keep: float) -> dict[int, float]:
        return self._of.get((name, 1.0 if name == FULL else keep), {})

    def print(self) -> None:
        print(f"\nSame {self.protocol}")
        self._table(
            "\nAccuracy on the test part, in percent", [FULL, BASE, *self.lists], self._accuracy
        )
        self._table(f"\nDifference to {BASE}, in points", self.lists, self._difference)
        noise = {
            keep: pooled_margin([self._gains(name, keep) for name in self.lists])
            for keep in self.keep
        }
        print("\nNoise of a difference (half its 95 % interval, spread pooled over all lists): "
              + ", ".join(f"{100 * value:.1f} at {keep:g}" for keep, value in noise.items() if np.isfinite(value)))  # fmt: skip

    def _table(self, title: str, names: Sequence[str], cell: Callable[[str, float], str]) -> None:
        head = " | ".join(f"keep {keep:g}" for keep in self.keep)
        print(f"{title}\n\n| list | {head} |\n|---|{'---|' * len(self.keep)}")
        for name in names:
            print(f"| {name} | " + " | ".join(cell(name, keep) for keep in self.keep) + " |")

    def _gains(self, name: str, keep: float) -> list[float]:
        values, others = self.of(name, keep), self.of(BASE, keep)
        return [values[seed] - others[seed] for seed in sorted(set(values) & set(others))]

    def _accuracy(self, name: str, keep: float) -> str:
        values = list(self.of(name, keep).values())
        return _cell(seed_interval(values) if values else None, "{:.1f}")

    def _difference(self, name: str, keep: float) -> str:
        return _cell(paired_difference(self.of(name, keep), self.of(BASE, keep)), "{:+.1f}")


def _cell(found: SeedInterval | None, form: str) -> str:
    if found is None:
        return ""
    text = form.format(100 * found.mean)
    margin = "" if found.low is None else f" ± {100 * (found.mean - found.low):.1f}"
    return f"{text}{margin} ({found.count})"


def parse() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dir", required=True, help="folder of Parquet files")
    add("--include", default=agreement.INCLUDE, help="which files of the folder are for training")
    add("--test-include", default="test-*", help="which are for the test")
    add("--lists", type=names_of, default=["0.2.loss.ccs", "0.2.loss.strata1"])
    add("--keep", type=shares_of, default=shares_of("0.1,0.2,0.3,0.5,0.7"))
    add("--seeds", type=int, default=5, help="of the trainings on lists")
    add("--scoring-seeds", type=int, default=2, help="runs that scores come from")
    add("--protocol", type=names_of, default=["epochs"], help="epochs, steps or both")
    add("--plain-random", action="store_true", help="random lists over all classes, too")
    add("--without-full", action="store_true", help="no training on everything")
    add("--scoring-epochs", type=int, default=15, help="of the proxies")
    recipe = quick.Recipe()
    add(
        "--sizes",
        type=lambda text: [int(part) for part in text.split(",")],
        default=list(recipe.sizes),
    )
    add("--epochs", type=int, default=recipe.epochs, help="of the trainings on lists")
    add("--batch", type=int, default=recipe.batch)
    add("--rate", type=float, default=recipe.rate)
    add(
        "--channels",
        type=lambda text: [int(part) for part in text.split(",")],
        default=list(recipe.channels),
    )
    add("--cache", default="/tmp/raypipe-pruning")
    add("--runs", default="/tmp/raypipe-agreement", help="runs of agreement.py")
    add("--threads", type=int, default=1)
    add("--minutes", type=float, help="stop after about so long, between two trainings")
    add("--only-cached", action="store_true", help="only print what is stored")
    arguments = parser.parse_args()
    for name in arguments.lists:
        _, score, cut = Lists.parts(name) if name.count(".") >= 2 else ("", "", "")
        if score not in agreement.VARIANTS or cut not in CUTS:
            parser.error(f"--lists: {name!r} is not KIND.SCORE.STRATEGY, such as 0.2.loss.ccs")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    os.makedirs(arguments.cache, exist_ok=True)
    trainings = Trainings(arguments)
    data, recipe = trainings.data, trainings.recipe
    print(
        f"{platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}; {arguments.dir}: {len(data.train):,} images of "
        f"{data.train.classes} classes, {len(data.test):,} for the test\nscores: whole runs, {arguments.scoring_epochs} epochs, "
        f"{arguments.scoring_seeds} runs\nlists: {recipe}; {arguments.seeds} seeds",
        flush=True,
    )
    if not arguments.only_cached:
        over = time.monotonic() + 60 * (arguments.minutes or np.inf)
        for job in trainings.jobs():
            if trainings.accuracy(job) is not None:
                continue
            if time.monotonic() > over:
                print("stopped for the time; the same command resumes", flush=True)
                break
            trainings.train(job)
    for protocol in arguments.protocol:
        Tables(trainings, protocol).print()


if __name__ == "__main__":
    main()
