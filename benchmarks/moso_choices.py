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
import glob
import io
import os
import platform
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from raypipe import training
from raypipe.config import ProxySettings
from raypipe.extrapolate.figures import spearman
from raypipe.models import build
from raypipe.scores.calibration import recalibrate
from raypipe.scores.head import head_gradient_sum, head_norms_and_alignments
from raypipe.scores.moso import combine, gradient_sum, without_itself
from raypipe.scores.per_sample import norms_and_alignments

WEIGHTS = ("lr", "none", "normalized")
CLASSES, BATCH = 10, 64


def read(source: str, files: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 3, 32, 32] and labels int64 [n] of a seeded shuffle."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in sorted(glob.glob(os.path.join(source, files))):
        table = pq.read_table(path)
        for row in table["image"].to_pylist():
            images.append(np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")).transpose(2, 0, 1))
        labels += table["label"].to_pylist()
    order = np.random.default_rng(0).permutation(len(labels))[:limit]
    return np.stack([images[row] for row in order]), np.array([labels[row] for row in order])


def train(
    settings: ProxySettings, images: np.ndarray, labels: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> tuple[torch.nn.Module, list[tuple[float, dict[str, torch.Tensor]]]]:
    """The trained network, and learning rate and weights at every checkpoint."""
    torch.manual_seed(settings.seed)
    model = build(settings.model, CLASSES, 32, mean.tolist(), std.tolist()).to(memory_format=torch.channels_last)
    optimizer = training.make_optimizer(settings, model)
    per_epoch, kept = training.steps_per_epoch(len(labels), settings.batch_size), training.checkpoint_epochs(settings)
    checkpoints = []
    for epoch in range(settings.epochs):
        model.train()
        for step, rows in enumerate(training.epoch_batches(len(labels), settings.batch_size, settings.seed, epoch)):
            rate = training.learning_rate(settings, epoch * per_epoch + step, per_epoch * settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixels = torch.from_numpy(training.augment(images[rows], settings, epoch, step, slice(None)))
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(pixels), torch.from_numpy(labels[rows])).backward()
            optimizer.step()
        if epoch in kept:
            checkpoints.append((rate, {name: value.clone() for name, value in model.state_dict().items()}))
    return model.eval(), checkpoints


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

    def score(self, weights: str, *, self_term: bool = False, head: bool = False, last: bool = False) -> np.ndarray:
        aligned = self.head if head else self.aligned
        aligned = without_itself(aligned, self.squares, self.samples) if self_term else aligned
        part = slice(-1, None) if last else slice(None)
        spread = self.aligned.std(0) if not head else self.head.std(0)
        return combine(aligned[:, part], self.rates[part], weights, steps=self.steps, samples=self.samples, spread=spread[part])


def measure(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, with_head: bool) -> tuple[np.ndarray, ...]:
    """Alignments, squares and head alignments [n] at one checkpoint."""
    pixels, target = torch.from_numpy(images), torch.from_numpy(labels)
    parts = [slice(start, start + BATCH) for start in range(0, len(labels), BATCH)]

    def mean_of(rule) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        for part in parts:
            for name, value in rule(model, pixels[part], target[part]).items():
                total[name] = total[name] + value if name in total else value
        return {name: value / len(labels) for name, value in total.items()}

    direction = mean_of(gradient_sum)
    both = [norms_and_alignments(model, pixels[part], target[part], direction) for part in parts]
    head = np.zeros(len(labels))
    if with_head:
        last = mean_of(head_gradient_sum)
        head = np.concatenate([head_norms_and_alignments(model, pixels[part], target[part], last)[1].numpy() for part in parts])
    return np.concatenate([dot.numpy() for _, dot in both]), np.concatenate([square.numpy() for square, _ in both]), head


def measured(size: int, seed: int, images: np.ndarray, labels: np.ndarray, cache: str) -> dict[bool, Measured]:
    """MoSo's numbers of a seed set of `size`, without and with recalibrated BatchNorm."""
    path = os.path.join(cache, f"measured-{size}-{seed}.npz")
    if not os.path.exists(path):
        images, labels = images[:size], labels[:size]
        settings = ProxySettings(model="small", image_size=32, epochs=30, checkpoints=10, seed=seed)
        mean, std = images.mean((0, 2, 3)) / 255, images.std((0, 2, 3)) / 255
        _, checkpoints = train(settings, images, labels, mean, std)
        model = build("small", CLASSES, 32, mean.tolist(), std.tolist()).to(memory_format=torch.channels_last)
        columns: dict[bool, list[tuple[np.ndarray, ...]]] = {False: [], True: []}
        for _, weights in checkpoints:
            model.load_state_dict(weights)
            columns[False].append(measure(model, images, labels, True))
            recalibrate(model, (torch.from_numpy(images[start : start + 256]) for start in range(0, size, 256)))
            columns[True].append(measure(model, images, labels, False))
        data = {f"{key}{flag:d}": np.stack(part, 1) for flag, all_ in columns.items()
                for key, part in zip(("aligned", "squares", "head"), zip(*all_, strict=True), strict=True)}  # fmt: skip
        steps = training.steps_per_epoch(size, settings.batch_size) * settings.epochs
        np.savez(path, rates=[rate for rate, _ in checkpoints], steps=steps, **data)
    found = np.load(path)
    return {
        flag: Measured(
            found[f"aligned{flag:d}"], found[f"squares{flag:d}"], found[f"head{flag:d}"], found["rates"], int(found["steps"])
        )
        for flag in (False, True)
    }


def accuracy(
    name: str,
    rows: np.ndarray,
    seed: int,
    train_set: tuple[np.ndarray, ...],
    test_set: tuple[np.ndarray, ...],
    epochs: int,
    cache: str,
) -> float:
    """Test accuracy of a fresh network trained on some rows."""
    path = os.path.join(cache, f"accuracy-{name}-{len(rows)}-{epochs}-{seed}.npy")
    if not os.path.exists(path):
        images, labels = train_set[0][rows], train_set[1][rows]
        settings = ProxySettings(model="small", image_size=32, epochs=epochs, checkpoints=1, seed=100 + seed)
        model, _ = train(settings, images, labels, images.mean((0, 2, 3)) / 255, images.std((0, 2, 3)) / 255)
        with torch.no_grad():
            guesses = [
                model(torch.from_numpy(test_set[0][start : start + 256])).argmax(1).numpy()
                for start in range(0, len(test_set[1]), 256)
            ]
        np.save(path, np.mean(np.concatenate(guesses) == test_set[1]))
    return float(np.load(path))


def balanced(score: np.ndarray, labels: np.ndarray, keep: float) -> np.ndarray:
    """Rows of the same share of every class, highest scores first."""
    parts = []
    for label in range(CLASSES):
        own = np.flatnonzero(labels == label)
        parts.append(own[np.argsort(-score[own], kind="stable")[: round(keep * len(own))]])
    return np.sort(np.concatenate(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--sizes", default="500,2000,10000")
    parser.add_argument("--downstream", type=int, default=0)
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=15, help="of the networks trained on keep-lists")
    parser.add_argument("--cache", default="/tmp/raypipe-moso-choices")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.makedirs(arguments.cache, exist_ok=True)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    images, labels = read(arguments.source, "train-*.parquet", max(*sizes, arguments.downstream, 1))
    print(f"{platform.machine()}, 1 thread; torch {torch.__version__}; CIFAR-10, small proxy, 30 epochs, 10 checkpoints, seed 0")

    found = {size: measured(size, 0, images, labels, arguments.cache) for size in sizes}
    print("\n1. Spearman of MoSo with and without the self term")
    print(f"{'N':>7}" + "".join(f"{weights:>14}" for weights in WEIGHTS) + f"{'last only':>14}")
    for size, both in found.items():
        plain = both[False]
        pairs = [(plain.score(weights), plain.score(weights, self_term=True)) for weights in WEIGHTS]
        pairs.append((plain.score("none", last=True), plain.score("none", last=True, self_term=True)))
        print(f"{size:>7}" + "".join(f"{spearman(*pair):>14.4f}" for pair in pairs))
    print("\n2. Spearman of the last layer's MoSo (gradient: head) with that of all layers")
    print(f"{'N':>7}" + "".join(f"{weights:>14}" for weights in WEIGHTS) + f"{'last only':>14}")
    for size, both in found.items():
        plain = both[False]
        agree = [spearman(plain.score(weights), plain.score(weights, head=True)) for weights in WEIGHTS]
        agree.append(spearman(plain.score("none", last=True), plain.score("none", last=True, head=True)))
        print(f"{size:>7}" + "".join(f"{value:>14.3f}" for value in agree))
    print("\n3. At every checkpoint: learning rate; |G|; spread of the alignments; the last two with BatchNorm recalibrated")
    for size, both in found.items():
        print(f"{size:>7}  " + "  ".join(
            f"{rate:.3f} {np.sqrt(max(0, a.mean())):.2f} {a.std():.2g} | {np.sqrt(max(0, b.mean())):.2f} {b.std():.2g}"
            for rate, a, b in zip(both[False].rates, both[False].aligned.T, both[True].aligned.T, strict=True)
        ))  # fmt: skip
    if arguments.downstream:
        downstream(arguments, images, labels)


def downstream(arguments: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> None:
    size = arguments.downstream
    test = read(arguments.source, "test-*.parquet", 4000)
    train_set = images[:size], labels[:size]
    both = measured(size, 0, images, labels, arguments.cache)
    lists = {
        f"{weights}{', recalibrated' if flag else ''}": both[flag].score(weights) for flag in (False, True) for weights in WEIGHTS
    }
    print(
        f"\n4. Accuracy on {len(test[1])} test images after {arguments.epochs} epochs on a share of {size} images; scores of one run"
    )
    for keep in map(float, arguments.keep.split(",")):
        for name, score in [*lists.items(), ("random", np.zeros(size))]:
            values = []
            for seed in range(arguments.seeds):
                used = np.random.default_rng(seed).random(size) if name == "random" else score
                values.append(
                    accuracy(name, balanced(used, train_set[1], keep), seed, train_set, test, arguments.epochs, arguments.cache)
                )
            each = " ".join(f"{value:.3f}" for value in values)
            print(f"keep {keep:g}  {name:<26}{np.mean(values):.3f}   ({each})", flush=True)


if __name__ == "__main__":
    main()
