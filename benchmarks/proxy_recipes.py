"""How short can the training of the proxies be? Cost of recipes, and whether they give the same scores.

    python benchmarks/proxy_recipes.py [--dir ../shared/data/cifar10] [--image-size 32] [--share 0.2] [--runs 2]
                                       [--recipes 30/128/0.1,15/32/0.05/progressive]

A recipe is epochs/batch size/learning rate, with /progressive for `proxy.progressive_resizing`. Each run draws its own seed set, divides it into three
parts, and trains two proxies on one part each, from weights of their own; all recipes have the same seed sets and weights. The score is the loss of a
linear probe, mean over both proxies, as a run writes it by default. Printed for each recipe: processor seconds of a training and accuracy on samples
that the proxy was not trained on; Spearman correlation of its scores in two runs, over samples outside all seed sets and within classes; and the same
between its scores in one run and those of the first recipe in another. If the latter agree as well as two runs of the first recipe do, the recipe
changes the scores no more than another seed does. Trainings are kept below --cache.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from dataclasses import dataclass

import common
import numpy as np
import torch
from agreement import within
from common import Images
from scipy.stats import spearmanr

from raypipe.config import ProxySettings
from raypipe.scores.linear_probe import LinearProbe
from raypipe.vision.devices import set_threads

PARTS, PROXIES = 3, 2


@dataclass(frozen=True)
class Result:
    """One recipe in one run: score [n], processor seconds of a training, and accuracy on unseen samples."""

    score: np.ndarray
    seconds: float
    accuracy: float


def seed_set(images: Images, share: float, run: int) -> np.ndarray:
    drawn = np.random.default_rng([run, 11]).permutation(len(images))
    return np.sort(drawn[: round(share * len(images))])


def proxy(
    arguments: argparse.Namespace, images: Images, recipe: str, run: int, number: int
) -> Result:
    """Train one proxy, or read its scores from the cache."""
    name = f"{os.path.basename(arguments.dir or 'digits')}-{images.pixels.shape[-1]}-{arguments.share:g}-{recipe.replace('/', '_')}-{run}-{number}"
    folder = os.path.join(arguments.cache, f"recipe-{name}")
    file = os.path.join(folder, "result.npz")
    if os.path.exists(file):
        return Result(**{key: value[()] for key, value in np.load(file).items()})
    drawn = np.random.default_rng([run, 12]).permutation(seed_set(images, arguments.share, run))
    own = np.sort(np.array_split(drawn, PARTS)[number])
    epochs, batch, rate, *progressive = recipe.split("/")
    settings = ProxySettings(
        model="small", image_size=images.pixels.shape[-1], epochs=int(epochs), batch_size=int(batch), lr=float(rate), seed=1000 * run + number,
        checkpoints=1, progressive_resizing=bool(progressive),
    )  # fmt: skip
    started = time.process_time()
    common.train(settings, images.take(own), folder)
    seconds = time.process_time() - started
    model = common.final(settings, images.classes, folder)
    with torch.inference_mode():
        embedding = torch.cat([model.embed(pixels) for pixels, _ in images.batches()])
        predicted = model.head(embedding).argmax(1).numpy()
    unseen = np.setdiff1d(np.arange(len(images)), own)
    vectors = embedding.numpy()
    probe = LinearProbe.fit(vectors[unseen], images.label[unseen], images.classes)
    score = probe.statistics(vectors, images.label)["loss"].astype(np.float64)
    result = Result(score, seconds, float((predicted == images.label)[unseen].mean()))
    np.savez(file, **vars(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.data_options(parser)
    parser.add_argument("--share", type=float, default=0.2, help="size of the seed set")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument(
        "--recipes",
        default="30/128/0.1,30/128/0.1/progressive,15/32/0.05,15/32/0.05/progressive,8/32/0.05,8/32/0.05/progressive",
    )
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    images, _ = common.load(arguments, 10_000)
    runs, recipes = range(1, arguments.runs + 1), common.names_of(arguments.recipes)
    outside = np.setdiff1d(
        np.arange(len(images)),
        np.concatenate([seed_set(images, arguments.share, run) for run in runs]),
    )
    label = images.label[outside]
    print(f"{platform.machine()}, {arguments.threads} thread(s); {arguments.dir or 'digits'}, {len(images):,} images, seed sets of "
          f"{arguments.share:.0%} in {PARTS} parts, {arguments.runs} runs\n")  # fmt: skip
    print(f"{'':<26}{'processor s':>12}{'accuracy':>10}{'two runs':>10}{'in classes':>12}{'with the first':>16}{'in classes':>12}")  # fmt: skip
    first: list[np.ndarray] = []
    for recipe in recipes:
        results = [
            [proxy(arguments, images, recipe, run, number) for number in range(PROXIES)]
            for run in runs
        ]
        # proxies of one run on one scale
        scores = [
            np.mean([one.score / one.score.std() for one in run], axis=0)[outside]
            for run in results
        ]
        first = first or scores
        every = [one for run in results for one in run]
        pairs = list(itertools.combinations(range(len(scores)), 2))
        alike = [(scores[i], scores[j]) for i, j in pairs]
        across = [(first[i], scores[j]) for i, j in itertools.permutations(range(len(scores)), 2)]
        cells = [
            np.mean(values)
            for couples in (alike, across)
            for values in (
                [spearmanr(*couple)[0] for couple in couples],
                [within(*couple, label) for couple in couples],
            )
        ]
        seconds, accuracy = (
            np.mean([getattr(one, name) for one in every]) for name in ("seconds", "accuracy")
        )
        print(
            f"{recipe:<26}{seconds:>12.1f}{accuracy:>10.3f}{cells[0]:>10.3f}{cells[1]:>12.3f}{cells[2]:>16.3f}{cells[3]:>12.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
