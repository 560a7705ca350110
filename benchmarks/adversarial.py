"""Keep-lists for adversarial training: scores measured inside it, extrapolated, and of a plain training, beside random lists.

    python benchmarks/adversarial.py [--dir DIR] [--samples 3000] [--seeds 3] [--cache DIR]

DIR is a folder of Parquet files with a part for training and one for the test (CIFAR-10: train-*, test-*); without, the bundled digits. For
every seed, as in `fidelity.py`,

    measured      a proxy trained adversarially (PGD) on all samples, which measures all: each score from its predictions at adversarial
                  examples, epoch by epoch
    extrapolated  one trained adversarially on a random 20 %, which measures these; the default extrapolator predicts the others
    plain         a proxy trained on all samples without an adversary, which measures all

Lists hold the highest scores; a fresh network is trained adversarially on each, and tested on images as they are and on adversarial examples
of them, with more iterations than in training. Tables: Spearman's correlation, outside the seed set, with what was measured; accuracies, mean
over the seeds ± half the width of the 95 % t interval, and differences to random lists, paired by seed. A small network after a few epochs is
far from what adversarial training reaches: what is compared is lists with one another.

Every training and fit is made once and kept below --cache: stopped at any time, the same command goes on; --only-cached prints what is
there. One process, no Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from common import (
    FULL,
    RANDOM,
    Images,
    Missing,
    data_options,
    load,
    names_of,
    of_all,
    plain_list,
    shares_of,
    shown,
    table,
)
from fidelity_runs import ProxyRun, Study

from raypipe.assessment.rank_agreement import spearman
from raypipe.config import AdversarySettings, MeasureSettings, ProxySettings
from raypipe.runs.ledger import fingerprint
from raypipe.vision import fitting

KINDS = ("measured", "extrapolated", "plain")
FIGURES = {"accuracy": "as they are", "robust": "under attack"}


class Attacked:
    """One seed: its scores, the lists cut from them, and what is trained on these."""

    def __init__(
        self, arguments: argparse.Namespace, images: Images, test: Images, seed: int
    ) -> None:
        self.arguments, self.images, self.test, self.seed = arguments, images, test, seed
        digits = arguments.dir is None  # a mirrored digit is no digit
        self.settings = ProxySettings(
            model=arguments.model, image_size=arguments.image_size, epochs=arguments.epochs, checkpoints=1, flip=not digits,
            crop_padding=1 if digits else max(1, arguments.image_size // 8),
            adversary=AdversarySettings(eps=arguments.eps, step_size=arguments.step_size, iterations=arguments.iterations),
        )  # fmt: skip
        self.judge = AdversarySettings(
            eps=arguments.eps,
            step_size=arguments.judge_step_size,
            iterations=arguments.judge_iterations,
        )
        measure = MeasureSettings.model_validate(
            {"dynamic_uncertainty": {"window": arguments.window}}
        )
        self._folder = self._folder_of(self.settings)
        plain = self.settings.model_copy(update={"adversary": None})
        self.adversarial, self.plain = (
            Study(
                images,
                given,
                measure,
                self._folder_of(given),
                arguments.threads,
                arguments.only_cached,
            )
            for given in (self.settings, plain)
        )

    def _folder_of(self, settings: ProxySettings) -> str:
        chosen = settings.model_dump(mode="json", exclude={"seed"}, exclude_none=True)
        name = f"adversarial-{fingerprint(self.arguments.dir, len(self.images), chosen, self.seed)}"
        folder = os.path.join(self.arguments.cache, name)
        os.makedirs(folder, exist_ok=True)
        return folder

    @property
    def seed_run(self) -> ProxyRun:
        return self.adversarial.of_seed_set(self.arguments.fraction, self.seed)

    def score(self, kind: str, score: str) -> np.ndarray:
        """Of every sample, float64 [n]; higher means keep. Raises Missing."""
        if kind == "extrapolated":
            found = self.adversarial.measured(self.seed_run, score).copy()
            found[self.adversarial.others(self.seed_run)] = self.adversarial.predicted(
                self.seed_run, score, "gnn"
            )[0]
            return found
        study = self.adversarial if kind == "measured" else self.plain
        return study.measured(study.full(self.seed), score)

    def agreement(self, kind: str, score: str) -> float | None:
        """Spearman's correlation with what is measured, outside the seed set. Raises Missing."""
        others = self.adversarial.others(self.seed_run)
        return spearman(self.score(kind, score)[others], self.score("measured", score)[others])

    def rows(self, name: str, keep: float) -> np.ndarray:
        count = len(self.images)
        if name in (RANDOM, FULL):
            return plain_list(name, keep, count, self.seed)
        return np.sort(
            np.argsort(-self.score(*name.split(".")), kind="stable")[: round(keep * count)]
        )

    def trained(self, name: str, keep: float) -> dict[str, float]:
        """accuracy and robust of a network trained adversarially on a list. Raises Missing."""
        path = os.path.join(
            self._folder,
            f"list-{name}-{keep:g}-{fingerprint(self.judge.model_dump(), len(self.test))}.json",
        )
        if not os.path.exists(path):
            if self.arguments.only_cached:
                raise Missing(path)
            rows, began = self.rows(name, keep), time.perf_counter()
            settings = self.settings.model_copy(update={"seed": 100 + self.seed})
            model = fitting.fit(
                settings,
                self.images.pixels,
                self.images.label,
                rows,
                self.images.classes,
                self._statistics,
            )
            tested = (self.test.pixels, self.test.label, self.test.classes)
            found = {
                "accuracy": fitting.test(model, *tested).accuracy,
                "robust": fitting.test(model, *tested, adversary=self.judge).accuracy,
            }
            with open(f"{path}.{os.getpid()}", "w") as file:
                json.dump(found, file)
            os.replace(f"{path}.{os.getpid()}", path)
            print(
                f"{time.strftime('%H:%M:%S')}  {name} {keep:g} {self.seed}: {time.perf_counter() - began:.1f} s",
                flush=True,
            )
        with open(path) as file:
            return json.load(file)

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        return fitting.statistics_of(self.images.pixels)


def agreements(seeds: Sequence[Attacked], scores: Sequence[str]) -> None:
    rows = []
    for kind in ("extrapolated", "plain"):
        cells = [
            of_all(seeds, lambda seed, score=score: seed.agreement(kind, score)) for score in scores
        ]
        rows.append((kind, [shown(values) for values in cells]))
    table(
        "Spearman's correlation with the score measured in adversarial training, outside the seed set, times 100",
        ("", *scores),
        rows,
    )


def accuracies(seeds: Sequence[Attacked], lists: Sequence[str], keep: Sequence[float]) -> None:
    pairs = [(fraction, figure) for fraction in keep for figure in FIGURES]
    head = [f"keep {fraction:g}, {FIGURES[figure]}" for fraction, figure in pairs]
    rows, gaps = [], []
    for name in [FULL, RANDOM, *lists]:
        cells = [
            of_all(
                seeds,
                lambda seed, k=fraction, f=figure: seed.trained(name, 1.0 if name == FULL else k)[
                    f
                ],
            )
            for fraction, figure in pairs
        ]
        rows.append((name, [shown(values) for values in cells]))
        if name not in (FULL, RANDOM):
            differences = [
                of_all(
                    seeds,
                    lambda seed, k=fraction, f=figure: (
                        seed.trained(name, k)[f] - seed.trained(RANDOM, k)[f]
                    ),
                )
                for fraction, figure in pairs
            ]
            gaps.append((name, [shown(values, "{:+.1f}") for values in differences]))
    table("Accuracy of networks trained adversarially on lists, in %", ("trained on", *head), rows)
    table("Difference to random lists, in points", ("trained on", *head), gaps)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    data_options(parser)
    add("--eps", default="8/255", help="of pixels from 0 to 1")
    add("--step-size", default="4/255", help="in training")
    add("--iterations", type=int, default=3, help="in training")
    add("--judge-step-size", default="2/255", help="in the test")
    add("--judge-iterations", type=int, default=10, help="in the test")
    add("--scores", type=names_of, default=["dynamic-uncertainty", "el2n"])
    add("--window", type=int, default=5, help="of Dynamic Uncertainty, in epochs")
    add(
        "--lists",
        type=names_of,
        help="such as measured.el2n,plain.el2n; default: all kinds of all scores",
    )
    add(
        "--fraction",
        type=float,
        default=0.2,
        help="share that is measured where scores are extrapolated",
    )
    add("--seeds", type=int, default=3)
    add("--model", default="small")
    add("--epochs", type=int, default=12, help="of proxies, and of networks trained on lists")
    add("--keep", type=shares_of, default=shares_of("0.5"))
    arguments = parser.parse_args()
    arguments.lists = arguments.lists or [
        f"{kind}.{score}" for score in arguments.scores for kind in KINDS
    ]
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    images, test = load(arguments, 3000)
    seeds = [Attacked(arguments, images, test, seed) for seed in range(arguments.seeds)]
    print(
        f"{platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}; "
        f"{os.path.basename(os.path.abspath(arguments.dir)) if arguments.dir else 'digits'}: {len(images)} samples of {images.classes} classes, "
        f"test part of {len(test)}; {arguments.model} at {arguments.image_size} pixels, {arguments.epochs} epochs; PGD within {arguments.eps}: "
        f"{arguments.iterations} steps of {arguments.step_size} in training, "
        f"{arguments.judge_iterations} of {arguments.judge_step_size} in the test; "
        f"extrapolated from {arguments.fraction:g}; {arguments.seeds} seeds",
        flush=True,
    )
    agreements(seeds, arguments.scores)
    accuracies(seeds, arguments.lists, arguments.keep)


if __name__ == "__main__":
    main()
