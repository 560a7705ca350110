"""MoSo's choices on CIFAR-10: does the self term matter, does the last layer suffice, and which weighting selects best?

    python benchmarks/moso_choices.py SOURCE [--sizes 500,2000,10000] [--downstream 10000] [--keep 0.5] [--seeds 2] [--cache DIR]

SOURCE is a folder with CIFAR-10 as Parquet (train-*, test-*). For every size N, the first N images of a seeded shuffle are the seed
set: the small proxy is trained on them (30 epochs, ten checkpoints, one seed), and MoSo measured on all of them. Tables:

1. Spearman of the score with and without the self term, for every weighting and for the last checkpoint alone;
2. Spearman of the last layer's score (gradient: head) with that of all layers;
3. length of the mean gradient and spread of the alignments at every checkpoint, without and with BatchNorm recalibrated;
4. with --downstream N: accuracy on the test images of fresh networks trained on keep-lists of each weighting (same share of each class,
   equal epochs), beside random keep-lists of the same size, mean and every seed. Networks and lists differ with the seed.

One process, one torch thread, no Ray. What was trained and measured is kept in --cache and not done again.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import dataclass

import numpy as np
import torch
from common import Images, checkpoints, final, mean_gradient, read, train

from raypipe.assessment.rank_agreement import spearman
from raypipe.config import ProxySettings, SourceSettings
from raypipe.proxies.networks import ProxyNet
from raypipe.scores.calibration import recalibrate
from raypipe.scores.head import head_gradient_sum, head_norms_and_alignments
from raypipe.scores.moso import combine, leave_one_out
from raypipe.scores.per_sample import norms_and_alignments
from raypipe.vision import training

WEIGHTS = ("lr", "none", "normalized")
SIZE = 32


@dataclass
class Measured:
    """aligned, squares, head [n, checkpoints]; rates [checkpoints]; steps."""

    aligned: np.ndarray
    squares: np.ndarray
    head: np.ndarray
    rates: np.ndarray
    steps: int

    @property
    def samples(self) -> int:
        return len(self.aligned)

    def score(
        self, weights: str, *, self_term: bool = False, head: bool = False, last: bool = False
    ) -> np.ndarray:
        aligned = self.head if head else self.aligned
        aligned = leave_one_out(aligned, self.squares, self.samples) if self_term else aligned
        part = slice(-1, None) if last else slice(None)
        spread = self.aligned.std(0) if not head else self.head.std(0)
        return combine(
            aligned[:, part],
            self.rates[part],
            weights,
            steps=self.steps,
            samples=self.samples,
            spread=spread[part],
        )


def measure(model: ProxyNet, images: Images, with_head: bool) -> tuple[np.ndarray, ...]:
    """Alignments, squares and head alignments [n] at one checkpoint."""
    direction = mean_gradient(model, images)
    both = [
        norms_and_alignments(model, pixels, target, direction)
        for pixels, target in images.batches()
    ]
    head = np.zeros(len(images))
    if with_head:
        last = mean_gradient(model, images, head_gradient_sum)
        found = [
            head_norms_and_alignments(model, pixels, target, last)[1].numpy()
            for pixels, target in images.batches()
        ]
        head = np.concatenate(found)
    return (
        np.concatenate([dot.numpy() for _, dot in both]),
        np.concatenate([square.numpy() for square, _ in both]),
        head,
    )


def measured(size: int, seed: int, images: Images, cache: str) -> dict[bool, Measured]:
    """MoSo's numbers of a seed set of `size`, without and with recalibrated BatchNorm."""
    path = os.path.join(cache, f"measured-{size}-{seed}.npz")
    if not os.path.exists(path):
        own, folder = images.take(slice(size)), os.path.join(cache, f"trained-{size}-{seed}")
        settings = ProxySettings(
            model="small", image_size=SIZE, epochs=30, checkpoints=10, seed=seed
        )
        train(settings, own, folder)
        columns: dict[bool, list[tuple[np.ndarray, ...]]] = {False: [], True: []}
        rates = []
        for _, rate, model in checkpoints(settings, images.classes, folder):
            rates.append(rate)
            columns[False].append(measure(model, own, True))
            recalibrate(model, (pixels for pixels, _ in own.batches(256)))
            columns[True].append(measure(model, own, False))
        data = {f"{key}{flag:d}": np.stack(part, 1) for flag, all_ in columns.items()
                for key, part in zip(("aligned", "squares", "head"), zip(*all_, strict=True), strict=True)}  # fmt: skip
        steps = training.steps_per_epoch(size, settings.batch_size) * settings.epochs
        np.savez(path, rates=rates, steps=steps, **data)
    found = np.load(path)
    return {
        flag: Measured(
            found[f"aligned{flag:d}"],
            found[f"squares{flag:d}"],
            found[f"head{flag:d}"],
            found["rates"],
            int(found["steps"]),
        )
        for flag in (False, True)
    }


def accuracy(
    name: str,
    rows: np.ndarray,
    seed: int,
    train_set: Images,
    test_set: Images,
    epochs: int,
    cache: str,
) -> float:
    """Test accuracy of a fresh network trained on some rows."""
    label = f"accuracy-{name}-{len(rows)}-{epochs}-{seed}"
    path = os.path.join(cache, f"{label}.npy")
    if not os.path.exists(path):
        settings = ProxySettings(
            model="small", image_size=SIZE, epochs=epochs, checkpoints=1, seed=100 + seed
        )
        train(settings, train_set.take(rows), os.path.join(cache, label))
        model = final(settings, train_set.classes, os.path.join(cache, label))
        with torch.no_grad():
            right = [
                (model(pixels).argmax(1) == target).numpy()
                for pixels, target in test_set.batches(256)
            ]
        np.save(path, np.mean(np.concatenate(right)))
    return float(np.load(path))


def balanced(score: np.ndarray, labels: np.ndarray, keep: float) -> np.ndarray:
    """Rows of the same share of every class, highest scores first."""
    parts = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        parts.append(own[np.argsort(-score[own], kind="stable")[: round(keep * len(own))]])
    return np.sort(np.concatenate(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--sizes", default="500,2000,10000")
    parser.add_argument("--downstream", type=int, default=0)
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--epochs", type=int, default=15, help="of the networks trained on keep-lists"
    )
    parser.add_argument("--cache", default="/tmp/raypipe-moso-choices")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.makedirs(arguments.cache, exist_ok=True)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    source = SourceSettings(uri=arguments.source, format="parquet", include="train-*.parquet")
    images = read(source, SIZE, max(*sizes, arguments.downstream, 1))
    print(
        f"{platform.machine()}, 1 thread; torch {torch.__version__}; CIFAR-10, small proxy, 30 epochs, 10 checkpoints, seed 0"
    )

    found = {size: measured(size, 0, images, arguments.cache) for size in sizes}
    print("\n1. Spearman of MoSo with and without the self term")
    print(f"{'N':>7}" + "".join(f"{weights:>14}" for weights in WEIGHTS) + f"{'last only':>14}")
    for size, both in found.items():
        plain = both[False]
        pairs = [
            (plain.score(weights), plain.score(weights, self_term=True)) for weights in WEIGHTS
        ]
        pairs.append(
            (plain.score("none", last=True), plain.score("none", last=True, self_term=True))
        )
        print(f"{size:>7}" + "".join(f"{spearman(*pair):>14.4f}" for pair in pairs))
    print("\n2. Spearman of the last layer's MoSo (gradient: head) with that of all layers")
    print(f"{'N':>7}" + "".join(f"{weights:>14}" for weights in WEIGHTS) + f"{'last only':>14}")
    for size, both in found.items():
        plain = both[False]
        agree = [
            spearman(plain.score(weights), plain.score(weights, head=True)) for weights in WEIGHTS
        ]
        agree.append(
            spearman(plain.score("none", last=True), plain.score("none", last=True, head=True))
        )
        print(f"{size:>7}" + "".join(f"{value:>14.3f}" for value in agree))
    print(
        "\n3. At every checkpoint: learning rate; |G|; spread of the alignments; the last two with BatchNorm recalibrated"
    )
    for size, both in found.items():
        print(f"{size:>7}  " + "  ".join(
            f"{rate:.3f} {np.sqrt(max(0, a.mean())):.2f} {a.std():.2g} | {np.sqrt(max(0, b.mean())):.2f} {b.std():.2g}"
            for rate, a, b in zip(both[False].rates, both[False].aligned.T, both[True].aligned.T, strict=True)
        ))  # fmt: skip
    if arguments.downstream:
        downstream(arguments, images)


def downstream(arguments: argparse.Namespace, images: Images) -> None:
    size = arguments.downstream
    test = read(
        SourceSettings(uri=arguments.source, format="parquet", include="test-*.parquet"), SIZE, 4000
    )
    train_set = images.take(slice(size))
    both = measured(size, 0, images, arguments.cache)
    lists = {
        f"{weights}{', recalibrated' if flag else ''}": both[flag].score(weights)
        for flag in (False, True)
        for weights in WEIGHTS
    }
    print(
        f"\n4. Accuracy on {len(test)} test images after {arguments.epochs} epochs on a share of {size} images; scores of one run"
    )
    for keep in map(float, arguments.keep.split(",")):
        for name, score in [*lists.items(), ("random", np.zeros(size))]:
            values = []
            for seed in range(arguments.seeds):
                used = np.random.default_rng(seed).random(size) if name == "random" else score
                values.append(
                    accuracy(
                        name,
                        balanced(used, train_set.label, keep),
                        seed,
                        train_set,
                        test,
                        arguments.epochs,
                        arguments.cache,
                    )
                )
            each = " ".join(f"{value:.3f}" for value in values)
            print(f"keep {keep:g}  {name:<26}{np.mean(values):.3f}   ({each})", flush=True)


if __name__ == "__main__":
    main()
