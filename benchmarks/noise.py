"""Do scores find wrong labels, and do they keep clean samples? A share of the labels is replaced, as by source.inject_noise.

    python benchmarks/noise.py [--dir DIR] [--noise 0.2] [--samples 5000] [--seeds 3] [--cache DIR]

DIR is a folder of Parquet files with a part for training and one for the test (CIFAR-10: train-*, test-*); without, the bundled digits. For
every seed other labels are replaced, and there are, as in `fidelity.py`,

    measured      a proxy trained on all samples, wrong labels included, which measures all
    extrapolated  a proxy trained on a random 20 %, which measures these; the default extrapolator predicts the score of the others

Tables, mean over the seeds ± half the width of the 95 % t interval:

1. samples ordered by the score, the likeliest label error first (lowest MoSo; highest EL2N, AUM as raypipe has it, and loss; for
   comparison the margin of the proxy at its end, without any score): precision among as many as were replaced, which is the recall there,
   too; average precision over all samples, and over those outside the seed set. Chance is the share that was replaced;
2. the list of runs up to 0.2.0: samples whose score is among the fifth at that end and whose label the proxy at its end contradicts, by its margin;
3. MoSo's claim that it keeps clean samples: share of wrong labels among the samples with the highest scores, at keep fractions;
4. how well the list "Labels to check" on the page of a run finds them: all samples whose label the proxies contradict, ordered by
   their margin. As in a run by default, three proxies, each trained on its part of the random 20 %, see only samples outside it; for
   comparison one proxy trained on the random 20 %. Precision of the whole list, recall, and precision of its first
   samples, as many as were replaced; the same of all samples ordered by the margin. --page-list prints this table alone;
5. with --train: accuracy, on the test part with its true labels, of fresh networks trained on such lists with the labels as they are.

Every training, measurement and fit is made once and kept below --cache: stopped at any time, the same command goes on; --only-cached prints
what is there. One process, no Ray.
"""

from __future__ import annotations

import argparse
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

from raypipe.config import MeasureSettings, ProxySettings
from raypipe.report.label_noise import RetrievalFigures, retrieval_figures
from raypipe.runs.ledger import fingerprint
from raypipe.sources.id_sampling import part_rule
from raypipe.sources.noise import LabelNoise
from raypipe.vision import fitting
from raypipe.vision.forward_by_proxies import forward_by_proxies

KINDS = ("measured", "extrapolated")
SCORES = ("moso", "el2n", "aum", "loss")
MARGIN = "margin"
"""The proxy's own, at the end of its training."""
CROSS_FIT = "cross-fit"
PAGE_LISTS = {
    CROSS_FIT: "three, each on a third of the seed set",
    "extrapolated": "one, on the seed set",
}
"""Proxies of the page's list, and how the table calls them."""
PARTS, PART_SEED = 3, 50_000
"""Parts of the seed set, and the first seed of their proxies."""
FIFTH = 0.2
"""Share of the samples among which the list of label errors of runs up to 0.2.0 is."""
MARGIN_SIGNAL = 1
"""Column of the margin among the signals of a sample."""


class Noisy:
    """One seed: labels that were replaced, the runs on them, and what they say."""

    def __init__(
        self, arguments: argparse.Namespace, images: Images, test: Images, seed: int
    ) -> None:
        self.arguments, self.test, self.seed = arguments, test, seed
        noise = LabelNoise(arguments.noise, seed)
        ids = [str(row) for row in range(len(images))]
        self.wrong = np.array([noise.replaced(name) for name in ids])
        label = np.array(
            [
                noise.wrong(name, int(label), images.classes)
                for name, label in zip(ids, images.label, strict=True)
            ]
        )
        self.images = Images(images.pixels, label, images.classes)
        digits = arguments.dir is None  # a mirrored digit is no digit
        settings = ProxySettings(
            model=arguments.model, image_size=arguments.image_size, epochs=arguments.epochs, checkpoints=arguments.checkpoints,
            flip=not digits, crop_padding=1 if digits else max(1, arguments.image_size // 8),
        )  # fmt: skip
        self.settings = settings
        what = fingerprint(
            arguments.dir,
            len(images),
            arguments.noise,
            seed,
            settings.model_dump(mode="json", exclude={"seed"}, exclude_none=True),
        )
        self._folder = os.path.join(arguments.cache, f"noise-{what}")
        os.makedirs(self._folder, exist_ok=True)
        self.study = Study(
            self.images,
            settings,
            MeasureSettings(),
            self._folder,
            arguments.threads,
            arguments.only_cached,
        )

    def run(self, kind: str) -> ProxyRun:
        return (
            self.study.full(self.seed)
            if kind == "measured"
            else self.study.of_seed_set(self.arguments.fraction, self.seed)
        )

    def score(self, kind: str, score: str) -> np.ndarray:
        """Of every sample, float64 [n]; higher means keep. Raises Missing."""
        run = self.run(kind)
        found = self.study.measured(run, score).copy()
        if kind == "extrapolated":
            found[self.study.others(run)] = self.study.predicted(run, score, "gnn")[0]
        return found

    def margin(self, kind: str) -> np.ndarray:
        """Of the label, by the proxy at the end of its training, float [n]. Raises Missing."""
        return self.study.nodes(self.run(kind)).signals[:, MARGIN_SIGNAL]

    def doubt(self, kind: str, score: str) -> np.ndarray:
        """Of every sample, float [n]: higher is the likelier label error."""
        if score == MARGIN:
            return -self.margin(kind)
        return self.score(kind, score) * (-1 if score == "moso" else 1)

    def ranked(self, kind: str, score: str, among: np.ndarray | None = None) -> dict[str, float]:
        """`retrieval_figures` of all samples, or those at the rows `among`, in the order of the doubt."""
        rows = np.arange(len(self.wrong)) if among is None else among
        order = rows[np.argsort(-self.doubt(kind, score)[rows], kind="stable")]
        return retrieval_figures(self.wrong[order], int(self.wrong[rows].sum()))

    def listed(self, kind: str, score: str) -> dict[str, float]:
        """`retrieval_figures` of the list of runs up to 0.2.0."""
        doubt, margin = self.doubt(kind, score), self.margin(kind)
        rows = np.flatnonzero((doubt >= np.quantile(doubt, 1 - FIFTH)) & (margin < 0))
        return retrieval_figures(
            self.wrong[rows[np.argsort(margin[rows], kind="stable")]], int(self.wrong.sum())
        )

    def page_list(self, proxies: str) -> RetrievalFigures:
        """Figures of the list "Labels to check" with the proxies of PAGE_LISTS."""
        found = self._outputs(proxies)
        contradicted = np.flatnonzero(found["prediction"] != self.images.label)
        order = contradicted[np.argsort(found["margin"][contradicted], kind="stable")]
        return retrieval_figures(self.wrong[order], int(self.wrong.sum()))

    def by_margin(self, proxies: str) -> RetrievalFigures:
        """Figures of all samples ordered by the margin of the same proxies."""
        order = np.argsort(self._outputs(proxies)["margin"], kind="stable")
        return retrieval_figures(self.wrong[order], int(self.wrong.sum()))

    def _outputs(self, proxies: str) -> dict[str, np.ndarray]:
        return self._cross_fit() if proxies == CROSS_FIT else self.study.outputs(self.run(proxies))

    def _cross_fit(self) -> dict[str, np.ndarray]:
        """Statistics of every sample by the proxies that were not trained on its part."""
        seed_set = self.study.of_seed_set(self.arguments.fraction, self.seed)
        part_of = part_rule(PARTS, self.seed)
        part = np.array([part_of(str(row)) for row in range(len(self.images))])
        runs = [
            ProxyRun(
                f"part-{seed_set.name}-{number}",
                seed_set.rows[part[seed_set.rows] == number],
                PART_SEED + PARTS * self.seed + number,
            )
            for number in range(PARTS)
        ]

        def forward(proxy: int, rows: np.ndarray) -> dict[str, np.ndarray]:
            return {
                name: values[rows]
                for name, values in self.study.outputs(runs[proxy]).items()
                if name != "seconds"
            }

        sees = {number: part != number for number in range(PARTS)}
        return forward_by_proxies(forward, sees, {}, PARTS - 1).columns

    def rows(self, name: str, keep: float) -> np.ndarray:
        """What a list holds: kind.score, the highest scores; random; full."""
        count = len(self.wrong)
        if name in (RANDOM, FULL):
            return plain_list(name, keep, count, self.seed)
        return np.sort(
            np.argsort(-self.score(*name.split(".")), kind="stable")[: round(keep * count)]
        )

    def accuracy(self, name: str, keep: float) -> float:
        """On the test part, of a network trained on a list with the labels as they are. Raises Missing."""
        arguments = self.arguments
        path = os.path.join(self._folder, f"accuracy-{name}-{keep:g}-{arguments.train_epochs}.npy")
        if not os.path.exists(path):
            if arguments.only_cached:
                raise Missing(path)
            settings = self.settings.model_copy(
                update={"epochs": arguments.train_epochs, "checkpoints": 1, "seed": 100 + self.seed}
            )
            rows, began = self.rows(name, keep), time.perf_counter()
            model = fitting.fit(
                settings,
                self.images.pixels,
                self.images.label,
                rows,
                self.images.classes,
                self._statistics,
            )
            found = fitting.test(
                model, self.test.pixels, self.test.label, self.test.classes
            ).accuracy
            np.save(path, found)
            print(
                f"{time.strftime('%H:%M:%S')}  {name} {keep:g} {self.seed}: {time.perf_counter() - began:.1f} s",
                flush=True,
            )
        return float(np.load(path))

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        return fitting.statistics_of(self.images.pixels)


def finding(seeds: Sequence[Noisy], names: Sequence[tuple[str, str]]) -> None:
    """names: kinds and scores."""
    share = shown([float(seed.wrong.mean()) for seed in seeds])

    def outside(seed: Noisy, kind: str, score: str) -> float:
        others = seed.study.others(seed.study.of_seed_set(seed.arguments.fraction, seed.seed))
        return seed.ranked(kind, score, others)["average_precision"]

    rows = [("chance", [share] * 3)]
    for kind, score in [*names, *((kind, MARGIN) for kind in KINDS)]:
        ranked = of_all(seeds, lambda seed, kind=kind, score=score: seed.ranked(kind, score))
        apart = of_all(seeds, lambda seed, kind=kind, score=score: outside(seed, kind, score))
        cells = (
            [found["at_replaced"]["precision"] for found in ranked],
            [found["average_precision"] for found in ranked],
            apart,
        )
        rows.append((f"{kind} {score}", [shown(values) for values in cells]))
    table(
        "1. All samples ordered by doubt, in %",
        (
            "order",
            "precision at the number replaced",
            "average precision",
            "average precision outside the seed set",
        ),
        rows,
    )
    rows = [("chance", ["", share, ""])]
    for kind, score in names:
        found = of_all(seeds, lambda seed, kind=kind, score=score: seed.listed(kind, score))
        listed = [each["listed"] / len(seeds[0].wrong) for each in found]
        cells = listed, [each["precision"] for each in found], [each["recall"] for each in found]
        rows.append((f"{kind} {score}", [shown(values) for values in cells]))
    table(
        "2. The list of runs up to 0.2.0: the fifth at the doubtful end that the proxy contradicts, in %",
        ("score", "of all samples", "precision", "recall"),
        rows,
    )


def page_list(seeds: Sequence[Noisy]) -> None:
    share = shown([float(seed.wrong.mean()) for seed in seeds])
    rows = [("chance", ["", share, "", share, share])]
    for proxies, title in PAGE_LISTS.items():
        found = of_all(seeds, lambda seed, proxies=proxies: seed.page_list(proxies))
        ordered = of_all(seeds, lambda seed, proxies=proxies: seed.by_margin(proxies))
        cells = (
            [figures["listed"] / len(seeds[0].wrong) for figures in found],
            [figures["precision"] for figures in found],
            [figures["recall"] for figures in found],
            [figures["at_replaced"]["precision"] for figures in found],
            [figures["at_replaced"]["precision"] for figures in ordered],
        )
        rows.append((title, [shown(values) for values in cells]))
    table(
        '4. The list "Labels to check": contradicted labels, ordered by the margin, in %',
        (
            "proxies",
            "of all samples",
            "precision",
            "recall",
            "precision of its first, as many as were replaced",
            "all samples by margin, the same",
        ),
        rows,
    )


def kept(seeds: Sequence[Noisy], names: Sequence[tuple[str, str]], keep: Sequence[float]) -> None:
    rows = []
    for name in [RANDOM, *map(".".join, names)]:
        cells = [
            of_all(seeds, lambda seed, k=k, name=name: float(seed.wrong[seed.rows(name, k)].mean()))
            for k in keep
        ]
        rows.append((name, [shown(values) for values in cells]))
    head = ("the highest scores", *(f"keep {fraction:g}" for fraction in keep))
    table("3. Share of wrong labels among the kept, in %", head, rows)


def trained(seeds: Sequence[Noisy], lists: Sequence[str], keep: Sequence[float]) -> None:
    rows = []
    for name in [FULL, RANDOM, *lists]:
        fractions = [1.0] * len(keep) if name == FULL else keep
        cells = [
            of_all(seeds, lambda seed, k=k, name=name: seed.accuracy(name, k)) for k in fractions
        ]
        rows.append((name, [shown(values) for values in cells]))
    head = ("trained on", *(f"keep {fraction:g}" for fraction in keep))
    table("5. Accuracy on the test part with its true labels, in %", head, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    data_options(parser)
    add("--noise", type=float, default=0.2, help="share of the labels that is replaced")
    add(
        "--fraction",
        type=float,
        default=0.2,
        help="share that is measured where scores are extrapolated",
    )
    add("--scores", type=names_of, default=list(SCORES), help="measured")
    add(
        "--extrapolated",
        type=names_of,
        default=list(SCORES),
        help="the same, extrapolated; a fit of each takes the longest",
    )
    add("--seeds", type=int, default=3)
    add("--model", default="small")
    add("--epochs", type=int, default=10, help="of the proxies")
    add("--checkpoints", type=int, default=4)
    add("--keep", type=shares_of, default=shares_of("0.3,0.5,0.7"))
    add(
        "--train",
        type=names_of,
        default=[],
        help="train on these lists, such as measured.moso,measured.el2n; also random and full",
    )
    add("--train-keep", type=shares_of, default=shares_of("0.5"))
    add("--train-epochs", type=int, default=6)
    add(
        "--page-list",
        action="store_true",
        help='print only how well the list "Labels to check" finds them',
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    os.makedirs(arguments.cache, exist_ok=True)
    images, test = load(arguments, 5000)
    seeds = [Noisy(arguments, images, test, seed) for seed in range(arguments.seeds)]
    settings = seeds[0].settings
    print(
        f"{platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}; "
        f"{os.path.basename(os.path.abspath(arguments.dir)) if arguments.dir else 'digits'}: {len(images)} samples of {images.classes} classes, "
        f"{arguments.noise:g} of the labels replaced; proxy {settings.model} at {settings.image_size} pixels, {settings.epochs} epochs, "
        f"{settings.checkpoints} checkpoints; extrapolated from {arguments.fraction:g}; {arguments.seeds} seeds",
        flush=True,
    )
    names = [("measured", score) for score in arguments.scores] + [
        ("extrapolated", score) for score in arguments.extrapolated
    ]
    if arguments.page_list:
        page_list(seeds)
        return
    finding(seeds, names)
    kept(seeds, names, arguments.keep)
    page_list(seeds)
    if arguments.train:
        print(
            f"\nTrained on lists: {settings.model} at {settings.image_size} pixels, {arguments.train_epochs} epochs; test part of {len(test)}"
        )
        trained(seeds, arguments.train, arguments.train_keep)


if __name__ == "__main__":
    main()
