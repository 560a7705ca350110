"""Can MoSo be made reproducible? Its variants over all weights, averaged over K proxies, each with its own seed set.

    python benchmarks/moso_agreement.py [--dir ../shared/data/cifar10] [--image-size 32] [--share 0.2] [--proxies 16] [--epochs 10]
                                        [--long-proxies 4] [--long-epochs 30] [--scored 600]

Of --samples images, --scored are set aside and never trained on. Every proxy draws its own seed set, weights and batches from the rest. All proxies
score the same images, so that each is as a sample of a whole dataset: unseen. Printed is the Spearman correlation between the means of two
disjoint groups of K proxies: mean over random pairs of groups, and the lowest and highest of them. EL2N and the loss of the same proxies stand
beside it. --long-proxies are trained for --long-epochs: K = 2 of 30 epochs costs what K = 6 of 10 does.

Gradients are over all weights, at four checkpoints, by forward mode (`raypipe.scores.moso`). Trainings and scores are kept below --cache.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import common
import numpy as np
import torch
import torch.nn.functional as F
from agreement import within
from common import Images
from scipy.stats import spearmanr
from torch import Tensor, nn

from raypipe.config import ProxySettings
from raypipe.proxies.networks import ProxyNet
from raypipe.scores.calibration import recalibrate
from raypipe.scores.moso import alignments
from raypipe.scores.per_sample import norms_and_alignments
from raypipe.vision.devices import set_threads

CHECKPOINTS = 4
MOMENT_BATCH = 16
"""Images whose gradient is squared at once for the second moment."""
GROUPS = (1, 2, 4, 8)
PAIRS = 24
"""Random pairs of groups of one size."""
DIRECTIONS = ("own", "held-out", "balanced", "whitened", "no-batchnorm")


@dataclass(frozen=True)
class Measured:
    """What one proxy says of the n scored images; all [n, checkpoints] but the last two, [n].

    aligned holds an array for every one of DIRECTIONS; norm is the length of the sample's gradient, rates [checkpoints].
    """

    aligned: Mapping[str, np.ndarray]
    norm: np.ndarray
    rates: np.ndarray
    loss: np.ndarray
    el2n: np.ndarray
    accuracy: float


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def mean_and_moment(model: ProxyNet, images: Images) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradient, and mean square of the gradients of small batches."""
    total: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for pixels, label in images.batches(MOMENT_BATCH):
        batch = gradient(model, F.cross_entropy(model(pixels), label, reduction="sum"))
        for name, value in batch.items():
            total[name] = total.get(name, 0) + value
            squares[name] = squares.get(name, 0) + value.square() / MOMENT_BATCH
    count = len(images)
    return (
        {name: value / count for name, value in total.items()},
        {name: value / count for name, value in squares.items()},
    )


def balanced_mean(model: ProxyNet, images: Images) -> dict[str, Tensor]:
    """Mean over the classes of the mean gradient of each class."""
    counts = np.bincount(images.label, minlength=images.classes)
    weight = torch.from_numpy(1 / np.maximum(counts, 1) / (counts > 0).sum()).float()
    total: dict[str, Tensor] = {}
    for pixels, label in images.batches():
        losses = F.cross_entropy(model(pixels), label, reduction="none")
        for name, value in gradient(model, (losses * weight[label]).sum()).items():
            total[name] = total.get(name, 0) + value
    return total


def whitened(mean: dict[str, Tensor], moment: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean gradient divided by the second moment, which is floored at a tenth of its average."""
    average = sum(float(value.sum()) for value in moment.values()) / sum(
        value.numel() for value in moment.values()
    )
    return {name: mean[name] / (moment[name] + 0.1 * average) for name in mean}


def without_batchnorm(model: nn.Module, mean: dict[str, Tensor]) -> dict[str, Tensor]:
    norms = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for key, _ in module.named_parameters(recurse=False)
    }
    return {
        name: torch.zeros_like(value) if name in norms else value for name, value in mean.items()
    }


class Study:
    """Proxies of one dataset, trained and measured once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.images, _ = common.load(arguments, 10_000)
        order = np.random.default_rng(0).permutation(len(self.images))
        self.scored = self.images.take(np.sort(order[: arguments.scored]))
        self.pool = np.sort(order[arguments.scored :])

    def proxies(self, epochs: int, count: int) -> list[Measured]:
        return [self._proxy(epochs, number) for number in range(count)]

    def _proxy(self, epochs: int, number: int) -> Measured:
        arguments = self.arguments
        drawn = np.random.default_rng([7, number]).permutation(self.pool)
        size = round(arguments.share * len(self.images))
        own = self.images.take(np.sort(drawn[:size]))
        held_out = self.images.take(np.sort(drawn[size : size + size // 2]))
        name = f"{os.path.basename(arguments.dir or 'digits')}-{len(self.images)}-{arguments.share:g}-{epochs}-{number}"
        folder = os.path.join(arguments.cache, f"moso-agreement-{name}")
        path = os.path.join(folder, f"measured-{arguments.scored}.npz")
        if not os.path.exists(path):
            settings = ProxySettings(
                model="small", image_size=self.images.pixels.shape[-1], epochs=epochs, seed=number,
                checkpoints=CHECKPOINTS,
            )  # fmt: skip
            common.train(settings, own, folder)
            arrays = self._measure(settings, folder, own, held_out)
            common.save(path, **arrays)
            print(f"  {name}: accuracy {arrays['accuracy']:.3f}", flush=True)
        with np.load(path) as stored:
            return Measured(
                {which: stored[f"aligned-{which}"] for which in DIRECTIONS},
                stored["norm"], stored["rates"], stored["loss"], stored["el2n"],
                float(stored["accuracy"]),
            )  # fmt: skip

    def _measure(
        self, settings: ProxySettings, folder: str, own: Images, held_out: Images
    ) -> dict[str, np.ndarray]:
        columns: dict[str, list[np.ndarray]] = {f"aligned-{which}": [] for which in DIRECTIONS}
        norm, rates, logits = [], [], np.empty(0)
        for _, rate, model in common.checkpoints(settings, self.images.classes, folder):
            recalibrate(model, (pixels for pixels, _ in own.batches()))
            mean, moment = mean_and_moment(model, own)
            directions = {
                "own": mean,
                "held-out": common.mean_gradient(model, held_out),
                "balanced": balanced_mean(model, own),
                "whitened": whitened(mean, moment),
                "no-batchnorm": without_batchnorm(model, mean),
            }
            for which, direction in directions.items():
                values = [
                    alignments(model, direction, pixels, label)
                    for pixels, label in self.scored.batches()
                ]
                columns[f"aligned-{which}"].append(torch.cat(values).numpy())
            squares = [
                norms_and_alignments(model, pixels, label)[0]
                for pixels, label in self.scored.batches()
            ]
            norm.append(torch.cat(squares).sqrt().numpy())
            rates.append(rate)
            with torch.inference_mode():
                logits = torch.cat([model(pixels) for pixels, _ in self.scored.batches()]).numpy()
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probability = (shifted / shifted.sum(1, keepdims=True)).astype(np.float64)
        rows = np.arange(len(logits))
        error = probability - np.eye(probability.shape[1])[self.scored.label]
        return {name: np.stack(values, 1) for name, values in columns.items()} | {
            "norm": np.stack(norm, 1),
            "rates": np.array(rates),
            "loss": -np.log(np.maximum(probability[rows, self.scored.label], 1e-12)),
            "el2n": np.linalg.norm(error, axis=1),
            "accuracy": np.array((logits.argmax(1) == self.scored.label).mean()),
        }


def moso(
    which: str = "own", weights: str = "lr", cosine: bool = False, last: int = CHECKPOINTS
) -> Callable[[Measured], np.ndarray]:
    """MoSo of a proxy: direction, weights of the checkpoints, length divided out, last checkpoints only."""

    def score(of: Measured) -> np.ndarray:
        values = of.aligned[which] / (of.norm if cosine else 1)
        factor = {
            "lr": of.rates,
            "none": np.ones(CHECKPOINTS),
            "normalized": 1 / values.std(0),
        }[weights]
        return (values * factor)[:, -last:].mean(1)

    return score


VARIANTS: dict[str, Callable[[Measured], np.ndarray]] = {
    "loss of the last layer": lambda of: of.loss,
    "EL2N": lambda of: of.el2n,
    "MoSo, Eq. 4 (weights: lr)": moso(),
    "weights: none": moso(weights="none"),
    "weights: normalized (each checkpoint)": moso(weights="normalized"),
    "cosine (divided by |g|)": moso(weights="none", cosine=True),
    "cosine, normalized": moso(weights="normalized", cosine=True),
    "G of held-out samples, normalized": moso("held-out", "normalized"),
    "G of held-out samples, cosine": moso("held-out", "normalized", cosine=True),
    "class-balanced G, normalized": moso("balanced", "normalized"),
    "whitened G, normalized": moso("whitened", "normalized"),
    "whitened G, cosine": moso("whitened", "normalized", cosine=True),
    "without BatchNorm's weights, normalized": moso("no-batchnorm", "normalized"),
    "last half of the checkpoints, normalized": moso(weights="normalized", last=2),
    "last checkpoint": moso(weights="none", last=1),
    "last three checkpoints, cosine": moso(weights="normalized", cosine=True, last=3),
    "last half, whitened G, cosine": moso("whitened", "normalized", cosine=True, last=2),
}


def agreements(scores: np.ndarray, size: int, label: np.ndarray) -> Iterator[tuple[float, float]]:
    """Spearman over all images and within classes, of the means of two disjoint groups of rows."""
    for draw in range(PAIRS):
        order = np.random.default_rng([draw, size]).permutation(len(scores))
        first, second = scores[order[:size]].mean(0), scores[order[size : 2 * size]].mean(0)
        yield spearmanr(first, second)[0], within(first, second, label)


def table(proxies: list[Measured], label: np.ndarray, title: str) -> None:
    groups = [size for size in GROUPS if 2 * size <= len(proxies)]
    accuracy = np.mean([of.accuracy for of in proxies])
    print(f"\n{title}: {len(proxies)} proxies, accuracy on the scored images {accuracy:.3f}")
    print(f"{'':<47}" + "".join(f"{f'K = {size}':>18}" for size in groups) + "  within classes")
    for name, variant in VARIANTS.items():
        scores = np.stack([variant(of) for of in proxies])
        scores = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
        cells, inside = [], 0.0
        for size in groups:
            values = np.array(list(agreements(scores, size, label)))
            overall, inside = values[:, 0], values[:, 1].mean()
            cells.append(f"{overall.mean():>6.2f} {overall.min():>5.2f}..{overall.max():<4.2f}")
        print(f"{name:<47}" + "".join(cells) + f"  {inside:>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.data_options(parser)
    add = parser.add_argument
    add("--share", type=float, default=0.2, help="size of the seed sets")
    add("--proxies", type=int, default=16)
    add("--epochs", type=int, default=10)
    add("--long-proxies", type=int, default=4)
    add("--long-epochs", type=int, default=30)
    add("--scored", type=int, default=600, help="images that are scored, never trained on")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    study = Study(arguments)
    print(
        f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}; {arguments.dir or 'digits'}, "
        f"{len(study.images):,} images, seed sets of {arguments.share:.0%}",
        flush=True,
    )
    for epochs, count in (
        (arguments.epochs, arguments.proxies),
        (arguments.long_epochs, arguments.long_proxies),
    ):
        table(study.proxies(epochs, count), study.scored.label, f"{epochs} epochs")


if __name__ == "__main__":
    main()
