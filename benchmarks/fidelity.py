"""How well extrapolated scores rank samples that were not measured: every extrapolator, several scores, several seed sets.

    python benchmarks/fidelity.py DATA [--samples 10000] [--sizes 0.05,0.10,0.20] [--seeds 3] [--epochs 30] [--cache DIR]

DATA is a folder of Parquet files, or `digits` for the bundled set. For every seed there are

    a full run   a proxy trained on all samples, which measures all: the truth of scores that need training on the sample
    seed runs    a proxy trained on a random 5, 10 or 20 % of the samples, the seed set, which measures these; each extrapolator is
                 fitted on them and predicts all others. MoSo needs no training on the sample: the seed run's own proxy measures how
                 each sample outside aligns with the mean gradient of the seed set, "directly", which is the truth of MoSo

and the tables give Spearman's correlation, on the samples outside the seed set, of what is predicted with the truth: the mean over the
seeds, and half the width of its 95 % t interval. From seed to seed everything differs: seed set, initial weights, order, full run. No two
proxies begin with the same weights. Below a table stand the run-to-run ceilings: the same samples' scores measured in two runs.

The default extrapolator, gnn, comes with a rehearsal for scores that need training on the sample, as in a run: a second proxy is trained
on half of the seed set. gnn-alone is the same without.

Then, in words, what the default extrapolator is to reach and does; and what it does that seed samples were trained on and the others were
not: their signals and embeddings, the fidelity on seed samples held out of a fit beside that outside, and what the rehearsal gains.
--cross-fit tries other ways against it. Every training, measurement and fit is made once and kept below --cache: stopped at any time, the
same command goes on. --plan says how long it would take, --only-cached prints what is there. Several processes can make a seed each:
--seeds 1 --first-seed 2.
One process, no Ray.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import numpy as np
import torch
from common import BASELINES, Images, names_of, read, save, shares_of
from fidelity_runs import ALONE, Step, Study
from fidelity_tables import (
    DEFAULT,
    SHIFT_METHODS,
    Results,
    cross_fit,
    reach,
    rehearsals,
    shift,
    table,
    truths,
)

from raypipe.config import MeasureSettings, ProxySettings, SourceSettings
from raypipe.runs.ledger import fingerprint

ROWS = ("gnn", ALONE, "gnn-published", "knn-published", "knn", "mlp", "trees", "proxy", *BASELINES)


def open_study(arguments: argparse.Namespace) -> Study:
    """The data, decoded once, and the folder of everything made from it with these settings."""
    digits = arguments.data == "digits"
    source = (
        SourceSettings(uri="digits://", format="digits")
        if digits
        else SourceSettings(
            uri=os.path.abspath(arguments.data),
            format="parquet",
            include=arguments.include,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
        )
    )
    size = arguments.image_size or (16 if digits else 32)
    # a mirrored digit is no digit
    augmentation = {"flip": False, "crop_padding": 1} if digits else {}
    settings = ProxySettings(
        model=arguments.model,
        image_size=size,
        epochs=arguments.epochs,
        checkpoints=arguments.checkpoints,
        **augmentation,
    )
    measure = MeasureSettings.model_validate(
        {
            "el2n": {"last_epoch": arguments.el2n_epochs},
            "recalibrate": not arguments.not_recalibrated,
        }
    )
    name = "digits" if digits else os.path.basename(source.uri)
    data = f"{name}-{arguments.samples}-{fingerprint(source.model_dump(mode='json'), size, arguments.samples)}"
    folder = os.path.join(arguments.cache, data)
    os.makedirs(folder, exist_ok=True)
    file = os.path.join(folder, "images.npz")
    if not os.path.exists(file):
        images = read(source, size, arguments.samples)
        save(file, pixels=images.pixels, label=images.label, classes=np.array(images.classes))
    with np.load(file) as found:
        images = Images(found["pixels"], found["label"], int(found["classes"]))
    chosen = fingerprint(settings.model_dump(mode="json", exclude={"seed"}, exclude_none=True))
    proxies = os.path.join(folder, f"{settings.model}-{settings.epochs}-epochs-{chosen}")
    return Study(images, settings, measure, proxies, arguments.threads, arguments.only_cached)


def work(study: Study, arguments: argparse.Namespace, seeds: Sequence[int]) -> list[Step]:
    """All that has to be made, in an order in which the first seed is complete first."""
    steps: list[Step] = []
    for seed in seeds:
        steps += study.steps(arguments.scores, arguments.sizes, arguments.methods, seed)
        shown = [method for method in SHIFT_METHODS if method in arguments.methods]
        steps += study.fold_steps(arguments.scores, arguments.shift_size, shown, seed)
        if arguments.cross_fit:
            steps += study.crossed_steps(arguments.scores, arguments.shift_size, DEFAULT, seed)
    return [step for step in steps if not os.path.exists(step.path)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="folder of Parquet files, or digits")
    add("--include", default="train-*", help="which files of the folder")
    add("--image-column", default="image")
    add("--label-column", default="label")
    add("--samples", type=int, default=10_000, help="drawn from the data")
    add("--image-size", type=int, help="default: 32, of digits 16")
    add("--model", default="small", help="as proxy.model")
    add("--epochs", type=int, default=30)
    add("--checkpoints", type=int, default=10)
    add(
        "--sizes",
        type=shares_of,
        default=shares_of("0.05,0.10,0.20"),
        help="shares that are scored",
    )
    add("--seeds", type=int, default=3, help="how many")
    add("--first-seed", type=int, default=0)
    add(
        "--scores",
        type=names_of,
        default=names_of("moso,moso-normalized,el2n,tdds,dynamic-uncertainty"),
        help="these, moso-none, other trajectory scores, and el2n-, loss-, entropy-checkpoints (`at: checkpoints`)",
    )
    add("--methods", type=names_of, default=list(ROWS), help=f"of {','.join(ROWS)}")
    add("--el2n-epochs", type=int, default=10, help="EL2N is the mean over so many first epochs")
    add(
        "--not-recalibrated",
        action="store_true",
        help="MoSo without measure.recalibrate, as published",
    )
    add(
        "--shift-size",
        type=float,
        help="share scored in the tables of shift and cross-fitting; default: the middle of --sizes",
    )
    add("--cross-fit", action="store_true")
    add("--cache", default="/tmp/raypipe-fidelity")
    add(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="of training and measuring; fits have one",
    )
    add("--plan", action="store_true", help="only say what there is to do, and how long it takes")
    add("--only-cached", action="store_true", help="only print what is there")
    add("--refit", type=names_of, default=[], help="methods whose predictions are made again")
    arguments = parser.parse_args()
    arguments.shift_size = (
        arguments.shift_size or sorted(arguments.sizes)[len(arguments.sizes) // 2]
    )
    if arguments.shift_size not in arguments.sizes:
        parser.error("--shift-size is not one of --sizes")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    study, seeds = (
        open_study(arguments),
        range(arguments.first_seed, arguments.first_seed + arguments.seeds),
    )
    if not (arguments.plan or arguments.only_cached):
        study.forget(arguments.refit)
    steps = [] if arguments.only_cached else work(study, arguments, seeds)
    images, settings = study.images, study.settings
    print(
        f"{platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}; {arguments.data}: {len(images)} samples of "
        f"{images.classes} classes; proxy {settings.model} at {settings.image_size} pixels, {settings.epochs} epochs, "
        f"{settings.checkpoints} checkpoints{'' if study.measure.recalibrate else ', not recalibrated'}; seeds {seeds.start} to {seeds.stop - 1}",
        flush=True,
    )
    if steps:
        unit = study.unit()
        training, fits = (
            unit * sum(step.units for step in steps),
            sum(step.seconds for step in steps),
        )
        print(
            f"{len(steps)} steps to do, about {(training + fits) / 60:.0f} minutes: {training / 60:.0f} of training and measuring at "
            f"{1e3 * unit:.2f} ms for a step of an image, {fits / 60:.0f} of fits (a rough guess)",
            flush=True,
        )
    if arguments.plan:
        return
    for step in steps:
        step.do()
    results = Results(study, arguments.sizes, seeds, arguments.methods)
    for score in arguments.scores:
        for truth in truths(score):
            table(results, score, truth)
    print(
        f"\nSpearman outside the seed set, mean over {len(seeds)} seeds ± half the width of its 95 % t interval, or (seeds) where not all "
        "have it; full v. full: mean and range. fit: one fit with its predictions, one thread, smallest to largest share."
    )
    reach(results, arguments.scores)
    shift(results, arguments.scores, arguments.shift_size)
    rehearsals(results, arguments.scores, arguments.shift_size)
    if arguments.cross_fit:
        cross_fit(results, arguments.scores, arguments.shift_size)


if __name__ == "__main__":
    main()
