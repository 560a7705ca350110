"""Which score and strategy is worth pruning by: fresh networks trained on keep-lists, compared with random lists of the same size.

    python benchmarks/pruning.py DATA [--samples 10000] [--keep 0.1,0.3,0.5,0.7,0.9] [--seeds 3] [--cache DIR]

DATA is a folder of Parquet files with a part for training and one for the test (CIFAR-10: train-*, test-*), or `digits` for the bundled
set, of which what is not drawn is the test. Scores come from runs as in `fidelity.py`, and from its cache where they are there:

    measured      by a proxy trained on all samples: the score of everything
    extrapolated  by a proxy trained on a random 20 %, measured there, and predicted by the default extrapolator for the others; of
                  MoSo, too. The loss that `ccs`, `mixed` and `beta` look at is that of the same proxy

Lists are cut by `raypipe.selection` with its default options, also within each class (ccs-by-class), with a fixed `hard_cutoff`
(ccs0.1), and with one stratum (ccs1: at random once the hardest are left out, whatever the score). A fresh network is trained on each with
the same epochs (`raypipe.vision.fitting`), with --seeds seeds of weights, order and augmentation, as many random lists, and the full
set. Scores come from --scoring-seeds runs of their own weights; training seed s takes the scores of run s modulo their number.

The tables give the accuracy on the test part, mean over the seeds ± half its 95 % t interval; the difference to random, paired over seeds,
with the same; then what is never below random outside noise, and the loss of extrapolated against measured lists. Three seeds make
wide intervals, so the noise that verdicts go by is that of all lists of a fraction pooled; it stands with them.

Every training is made once and kept below --cache: stopped at any time, the same command goes on. --steps says what there is to do and how
long it would take, --minutes stops between two trainings, --only-cached prints what is there. --lists names some of the lists, such as
measured.moso.top,extrapolated.el2n.ccs. One process, no Ray.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import fidelity
import numpy as np
import torch
from common import FULL, RANDOM, Images, names_of, plain_list, read, shares_of
from fidelity_runs import ProxyRun, Step, Study

from raypipe.config import ProxySettings, SourceSettings
from raypipe.config.choices import DIFFICULTIES
from raypipe.evaluation.figures import SeedInterval, paired_difference, pooled_margin, seed_interval
from raypipe.runs.ledger import fingerprint
from raypipe.selection import STRATEGIES, Chunk, SelectionOptions, select
from raypipe.vision import fitting
from raypipe.vision.networks import build_network

KINDS = ("measured", "extrapolated")
SCORES = ("moso", "el2n", "tdds", "dynamic-uncertainty", "dual")
EXTRAPOLATOR = "gnn"
BY_CLASS, FIXED, ONE = "-by-class", "0.1", "1"
STRATEGY_NAMES = (
    *(name for name in STRATEGIES if name != RANDOM),
    *(f"ccs{variant}{suffix}" for variant in (FIXED, ONE) for suffix in ("", BY_CLASS)),
    *(
        f"{name}{BY_CLASS}"
        for name in STRATEGIES
        if not STRATEGIES[name].uses_classes and name not in ("top", RANDOM)
    ),
)


@dataclass(frozen=True)
class Job:
    """One training: a list by name (measured.moso.top, random, full), a keep fraction and a seed."""

    name: str
    keep: float
    seed: int


class Pruning:
    """Everything that is trained and compared, on one dataset."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        self.study: Study = fidelity.open_study(arguments)
        digits = arguments.data == "digits"
        self.size = arguments.train_size or self.study.settings.image_size
        self._images = os.path.join(
            arguments.cache, f"pruning-{os.path.basename(os.path.abspath(arguments.data))}"
        )
        self.settings = ProxySettings(
            model=arguments.train_model,
            image_size=self.size,
            epochs=arguments.train_epochs,
            batch_size=arguments.batch_size,
            checkpoints=1,
            flip=not digits,
            crop_padding=max(1, self.size // 8) if not digits else 1,
        )
        chosen = self.settings.model_dump(mode="json", exclude={"seed"}, exclude_none=True)
        what = fingerprint(
            chosen,
            arguments.samples,
            arguments.seed_fraction,
            arguments.scoring_seeds,
            arguments.bfloat16,
        )
        self._results = os.path.join(self._images, f"trained-{what}")
        os.makedirs(self._results, exist_ok=True)

    # -- data -------------------------------------------------------------------------------------------------------------

    @cached_property
    def data(self) -> tuple[Images, Images]:
        """What is trained on, in the order of the study, and the test part, at the size of the trainings."""
        arguments, path = (
            self.arguments,
            os.path.join(self._images, f"images-{self.arguments.samples}-{self.size}.npz"),
        )
        if not os.path.exists(path):
            parts = (
                self._read_digits()
                if arguments.data == "digits"
                else (self._read(arguments.include), self._read_test())
            )
            names = ("pixels", "label")
            arrays = {
                f"{which}_{name}": getattr(part, name)
                for which, part in zip(("train", "test"), parts)
                for name in names
            }
            os.makedirs(self._images, exist_ok=True)
            np.savez(path, **arrays)
        with np.load(path) as found:
            classes = self.study.images.classes
            train, test = (
                Images(found[f"{which}_pixels"], found[f"{which}_label"], classes)
                for which in ("train", "test")
            )
        assert np.array_equal(train.label, self.study.images.label), "the study has other samples"
        return train, test

    def _read(self, include: str, limit: int | None = -1) -> Images:
        arguments = self.arguments
        columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
        source = SourceSettings(
            uri=os.path.abspath(arguments.data), format="parquet", include=include, **columns
        )
        return read(source, self.size, arguments.samples if limit == -1 else limit)

    def _read_test(self) -> Images:
        return self._read(self.arguments.test_include, self.arguments.test_samples)

    def _read_digits(self) -> tuple[Images, Images]:
        every, count = (
            read(SourceSettings(uri="digits://", format="digits"), self.size),
            self.arguments.samples,
        )
        return every.take(slice(count)), every.take(slice(count, None))

    # -- lists ------------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        arguments = self.arguments
        if arguments.lists:
            return arguments.lists
        return [
            ".".join(parts)
            for parts in itertools.product(arguments.kinds, arguments.scores, arguments.strategies)
        ]

    def rows(self, job: Job) -> np.ndarray:
        """What a job is trained on, int64, rising."""
        count = len(self.study.images)
        if job.name in (RANDOM, FULL):
            return plain_list(job.name, job.keep, count, job.seed)
        kind, score, strategy = job.name.split(".", 2)
        run = self._scored_by(kind, job.seed)
        known = self.score(run, kind, score).astype(np.float32)
        loss = self.study.nodes(run).signals[:, 0].astype(np.float32)
        chunk = Chunk(
            known,
            self.study.images.label.astype(np.int32),
            [f"{row}" for row in range(count)],
            loss,
        )
        options = SelectionOptions(
            seed=job.seed,
            difficulty="score" if score in DIFFICULTIES else "loss",
            by_class=strategy.endswith(BY_CLASS),
            hard_cutoff=float(FIXED) if FIXED in strategy else "auto",
        )
        plain = strategy.removesuffix(BY_CLASS).removesuffix(FIXED)
        if plain.endswith(ONE):
            plain, options = plain.removesuffix(ONE), replace(options, strata=1)
        (cut,) = select(lambda _: [chunk], [job.keep], plain, self.study.images.classes, options)
        return np.flatnonzero(cut.mask(chunk))

    def _scored_by(self, kind: str, seed: int) -> ProxyRun:
        scored = seed % self.arguments.scoring_seeds
        return (
            self.study.full(scored)
            if kind == "measured"
            else self.study.of_seed_set(self.arguments.seed_fraction, scored)
        )

    def score(self, run: ProxyRun, kind: str, score: str) -> np.ndarray:
        """Of every sample, float64 [n]; higher means keep."""
        found = self.study.measured(run, score).copy()
        if kind == "extrapolated":
            found[self.study.others(run)] = self.study.predicted(run, score, EXTRAPOLATOR)[0]
        return found

    # -- trainings --------------------------------------------------------------------------------------------------------

    def jobs(self) -> Iterator[Job]:
        """All trainings: what lists are compared with first, then list by list."""
        seeds = range(self.arguments.seeds)
        yield from (Job(FULL, 1.0, seed) for seed in seeds if not self.arguments.without_full)
        for name in [RANDOM, *self.names()]:
            for keep, seed in itertools.product(self.arguments.keep, seeds):
                if not (
                    FIXED in name and keep + float(FIXED) > 1 + 1e-9
                ):  # nothing is left to draw from
                    yield Job(name, keep, seed)

    def path(self, job: Job) -> str:
        return os.path.join(self._results, f"{job.name}-{job.keep:g}-{job.seed}.json")

    def result(self, job: Job) -> float | None:
        """Accuracy; None where it was not trained."""
        if not os.path.exists(self.path(job)):
            return None
        with open(self.path(job)) as file:
            return json.load(file)["accuracy"]

    def train(self, job: Job) -> None:
        train, test = self.data
        rows, settings = self.rows(job), self.settings.model_copy(update={"seed": 100 + job.seed})
        began, busy = time.perf_counter(), time.process_time()
        model = fitting.fit(
            settings,
            train.pixels,
            train.label,
            rows,
            train.classes,
            self._statistics,
            bfloat16=self.arguments.bfloat16,
        )
        tested = fitting.test(model, test.pixels, test.label, test.classes)
        seconds, cpu = time.perf_counter() - began, time.process_time() - busy
        found = {
            "accuracy": tested.accuracy,
            "samples": len(rows),
            "seconds": seconds,
            "cpu_seconds": cpu,
        }
        found["worst_class"] = float(np.nanmin(tested.per_class))
        temporary = f"{self.path(job)}.{os.getpid()}"
        with open(temporary, "w") as file:
            json.dump(found, file)
        os.replace(temporary, self.path(job))
        print(
            f"{time.strftime('%H:%M:%S')}  {job.name:<40} {job.keep:<4g} {job.seed}  {tested.accuracy:.4f}  {cpu:6.1f} s",
            flush=True,
        )

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        return fitting.statistics_of(self.data[0].pixels)

    def unit(self) -> float:
        """Seconds of one step of training for one image."""
        part = self.data[0].take(slice(self.settings.batch_size))
        model = build_network(self.settings.model, part.classes, self.size).to(
            memory_format=torch.channels_last
        )
        times = []
        for _ in range(4):
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.bfloat16):
                loss = model(torch.from_numpy(part.pixels)).float().logsumexp(1).sum()
            loss.backward()
            times.append(time.perf_counter() - began)
        return min(times) / len(part)


class Tables:
    """What is there, in words."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning, self.keep = pruning, pruning.arguments.keep
        self._of: dict[tuple[str, float], dict[int, float]] = {}
        for job in pruning.jobs():
            value = pruning.result(job)
            if value is not None:
                self._of.setdefault((job.name, job.keep), {})[job.seed] = value
        self.names = [
            name for name in pruning.names() if any(self.of(name, keep) for keep in self.keep)
        ]

    def of(self, name: str, keep: float) -> dict[int, float]:
        """Accuracy by seed."""
        return self._of.get((name, keep), {})

    def against_random(self, name: str, keep: float) -> SeedInterval | None:
        return paired_difference(self.of(name, keep), self.of(RANDOM, keep))

    def differences(self, name: str, keep: float) -> list[float]:
        values, others = self.of(name, keep), self.of(RANDOM, keep)
        return [values[seed] - others[seed] for seed in sorted(set(values) & set(others))]

    def print(self) -> None:
        references = [
            name for name in (FULL, RANDOM) if any(name == known for known, _ in self._of)
        ]
        self._table("\nAccuracy on the test part", [*references, *self.names], self._accuracy)
        self._table("\nDifference to random, in points of accuracy", self.names, self._difference)
        noise = {
            keep: pooled_margin([self.differences(name, keep) for name in self.names])
            for keep in self.keep
        }
        print("\nNoise of a difference (half its 95 % interval, spread pooled over all lists): "
              + ", ".join(f"{100 * value:.1f} at {keep:g}" for keep, value in noise.items() if np.isfinite(value)))  # fmt: skip
        self._verdicts(noise)
        self._extrapolated()

    def _table(self, title: str, names: Sequence[str], cell: Callable[[str, float], str]) -> None:
        print(
            f"{title}\n\n| list | "
            + " | ".join(f"keep {keep:g}" for keep in self.keep)
            + " |\n|"
            + "---|" * (len(self.keep) + 1)
        )
        for name in names:
            print(f"| {name} | " + " | ".join(cell(name, keep) for keep in self.keep) + " |")

    def _accuracy(self, name: str, keep: float) -> str:
        values = self.of(name, 1.0) if name == FULL else self.of(name, keep)
        return _cell(seed_interval(list(values.values())) if values else None, "{:.1f}")

    def _difference(self, name: str, keep: float) -> str:
        return _cell(self.against_random(name, keep), "{:+.1f}")

    def _verdicts(self, noise: dict[float, float]) -> None:
        never, rows = [], []
        for name in self.names:
            found = {keep: self.against_random(name, keep) for keep in self.keep}
            given = {
                keep: each.mean
                for keep, each in found.items()
                if each is not None and each.low is not None
            }
            below = [f"{keep:g}" for keep, mean in given.items() if mean < -noise[keep]]
            above = [f"{keep:g}" for keep, mean in given.items() if mean > noise[keep]]
            if given and not below:
                worst = min(given.values())
                never.append((worst, f"{name} (worst {100 * worst:+.1f}, mean {100 * np.mean(list(given.values())):+.1f}"
                              f"{'; above noise at ' + ', '.join(above) if above else ''})"))  # fmt: skip
            elif given:
                rows.append(
                    f"{name}: below at {', '.join(below)}"
                    + (f", above at {', '.join(above)}" if above else "")
                )
        print(
            "\nNever below random outside noise, at any fraction that was tried, the best worst case first:"
        )
        print("\n".join(f"  {text}" for _, text in sorted(never, reverse=True)) or "  none")
        print("Below random outside noise somewhere:")
        print("\n".join(f"  {text}" for text in rows) or "  none")

    def _extrapolated(self) -> None:
        pairs = [
            (name, f"measured{name.removeprefix('extrapolated')}")
            for name in self.names
            if name.startswith("extrapolated.")
        ]
        pairs = [(name, other) for name, other in pairs if other in self.names]
        if not pairs:
            return
        print("\nExtrapolated less measured, in points of accuracy, paired over seeds\n")
        print(
            "| list | "
            + " | ".join(f"keep {keep:g}" for keep in self.keep)
            + " |\n|"
            + "---|" * (len(self.keep) + 1)
        )
        means: dict[float, list[float]] = {}
        for name, other in pairs:
            cells = []
            for keep in self.keep:
                found = paired_difference(self.of(name, keep), self.of(other, keep))
                cells.append(_cell(found, "{:+.1f}"))
                if found is not None:
                    means.setdefault(keep, []).append(found.mean)
            print(f"| {name.removeprefix('extrapolated.')} | " + " | ".join(cells) + " |")
        row = []
        for keep in self.keep:
            values = means.get(keep, [])
            row.append(_cell(seed_interval(values), "{:+.1f}") if values else "")
        print("| mean over the lists | " + " | ".join(row) + " |")


def _cell(found: SeedInterval | None, form: str) -> str:
    if found is None:
        return ""
    text = form.format(100 * found.mean)
    return text if found.low is None else f"{text} ± {100 * (found.mean - found.low):.1f}"


def scoring_steps(pruning: Pruning) -> list[Step]:
    """What scores still need, in an order in which it can be made."""
    arguments, study, names = pruning.arguments, pruning.study, pruning.names()
    steps: list[Step] = []
    for seed in range(min(arguments.scoring_seeds, arguments.seeds)):
        for kind in (kind for kind in KINDS if any(name.startswith(kind) for name in names)):
            scores = list(
                dict.fromkeys(name.split(".")[1] for name in names if name.startswith(kind))
            )
            if kind == "measured":
                steps += study.steps(scores, [], [], seed)
            else:
                run = study.of_seed_set(arguments.seed_fraction, seed).name
                found = study.steps(scores, [arguments.seed_fraction], [EXTRAPOLATOR], seed)
                steps += [
                    step for step in found if os.path.basename(os.path.dirname(step.path)) == run
                ]
    return [step for step in steps if not os.path.exists(step.path)]


def parse() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="folder of Parquet files, or digits")
    add("--include", default="train-*", help="which files of the folder are for training")
    add("--test-include", default="test-*", help="which are for the test")
    add("--image-column", default="image")
    add("--label-column", default="label")
    add("--samples", type=int, default=10_000, help="drawn from the data")
    add("--test-samples", type=int, help="drawn from the test part; default: all")
    add("--scores", type=names_of, default=list(SCORES))
    add("--kinds", type=names_of, default=list(KINDS))
    add("--strategies", type=names_of, default=list(STRATEGY_NAMES))
    add(
        "--lists",
        type=names_of,
        default=[],
        help="these and no others, such as measured.moso.top,extrapolated.el2n.ccs",
    )
    add("--keep", type=shares_of, default=shares_of("0.1,0.3,0.5,0.7,0.9"))
    add("--seeds", type=int, default=3, help="of the trainings on lists")
    add("--scoring-seeds", type=int, default=3, help="runs that scores come from")
    add(
        "--seed-fraction",
        type=float,
        default=0.2,
        help="share that is measured where scores are extrapolated",
    )
    add("--train-model", default="small", help="what is trained on lists")
    add("--train-epochs", type=int, default=10)
    add("--train-size", type=int, help="pixels; default: those of the proxy")
    add("--batch-size", type=int, default=64)
    add("--bfloat16", action="store_true", help="train on lists in mixed precision")
    add("--without-full", action="store_true", help="no training on everything")
    add("--image-size", type=int, help="of the proxies that score; default: 32, of digits 16")
    add("--model", default="small", help="of the proxies that score")
    add("--epochs", type=int, default=30, help="of the proxies that score")
    add("--checkpoints", type=int, default=10)
    add("--el2n-epochs", type=int, default=10, help="EL2N is the mean over so many first epochs")
    add(
        "--not-recalibrated",
        action="store_true",
        help="MoSo without measure.recalibrate, as published",
    )
    add("--cache", default="/tmp/raypipe-fidelity")
    add("--threads", type=int, default=1)
    add("--minutes", type=float, help="stop after about so long, between two trainings")
    add("--steps", action="store_true", help="only say what there is to do, and how long it takes")
    add("--only-cached", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    known = {".".join(parts) for parts in itertools.product(KINDS, SCORES, STRATEGY_NAMES)}
    wrong = [name for name in arguments.lists if name not in known]
    if wrong:
        parser.error(
            f"--lists: {wrong[0]!r} is not one of kind.score.strategy, such as measured.moso.top"
        )
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    pruning = Pruning(arguments)
    settings, study = pruning.settings, pruning.study
    print(
        f"{platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}; {arguments.data}: {len(study.images)} samples of "
        f"{study.images.classes} classes\nscores: proxy {study.settings.model} at {study.settings.image_size} pixels, "
        f"{study.settings.epochs} epochs, {arguments.scoring_seeds} runs; extrapolated from {arguments.seed_fraction:g} by {EXTRAPOLATOR}\n"
        f"lists: {settings.model} at {settings.image_size} pixels, {settings.epochs} epochs of batches of {settings.batch_size}"
        f"{', bfloat16' if arguments.bfloat16 else ''}; {arguments.seeds} seeds; test part of {len(pruning.data[1])} samples",
        flush=True,
    )
    if not arguments.only_cached:
        steps = scoring_steps(pruning)
        jobs = [job for job in pruning.jobs() if pruning.result(job) is None]
        images = sum(round(job.keep * len(study.images)) * settings.epochs for job in jobs)
        scoring = (
            study.unit() * sum(step.units for step in steps) + sum(step.seconds for step in steps)
            if steps
            else 0.0
        )
        print(
            f"{len(steps)} steps of scoring to do, about {scoring / 60:.0f} minutes; {len(jobs)} trainings, about "
            f"{images * pruning.unit() / 60:.0f} minutes",
            flush=True,
        )
        if arguments.steps:
            for name, of in itertools.groupby(jobs, key=lambda job: job.name):
                print(f"  {name}: " + ", ".join(f"{job.keep:g}/{job.seed}" for job in of))
            return
        over = began + 60 * arguments.minutes if arguments.minutes else float("inf")
        for work in [
            *(step.do for step in steps),
            *(lambda job=job: pruning.train(job) for job in jobs),
        ]:
            if time.monotonic() > over:
                print("stopped for the time; the same command goes on", flush=True)
                break
            work()
    Tables(pruning).print()


if __name__ == "__main__":
    main()
