"""Which score would another training agree with? Candidates for the default score, and variants of MoSo, on the same proxies.

    python benchmarks/reproducibility.py [--dir ../shared/data/cifar100] [--share 0.2] [--parts 3] [--proxies 2] [--epochs 15] [--runs 2]

Each run draws its own seed set, divides it into --parts parts, and trains --proxies proxies on one part each, from weights of their own. Every
candidate is computed for all samples by each proxy. Printed are Spearman correlations between the first two runs, over samples outside both seed
sets: of one proxy of each, of the means over the proxies, and of these means within classes. MoSo is that of the last layer at the last checkpoint
(closed form), so that all its variants can be tried on all samples; `agreement.py --variants moso` has complete runs with all weights and
checkpoints. Trainings are kept below --cache.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import common
import numpy as np
import torch
from agreement import within
from common import Images
from scipy.stats import spearmanr

from raypipe.config import ProxySettings
from raypipe.extrapolators.neighbours import NeighbourIndex
from raypipe.scores.linear_probe import LinearProbe
from raypipe.vision.devices import set_threads

NEIGHBOURS = 200


@dataclass(frozen=True)
class Seen:
    """All n samples as one proxy sees them: logits [n, C], embedding [n, d], and the rows that it was trained on and that are its seed set."""

    logits: np.ndarray
    embedding: np.ndarray
    label: np.ndarray
    own: np.ndarray
    seed: np.ndarray

    @property
    def unseen(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.label)), self.own)

    @property
    def held_out(self) -> np.ndarray:
        return np.setdiff1d(self.seed, self.own)

    @property
    def log_probability(self) -> np.ndarray:
        shifted = self.logits - self.logits.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    @property
    def error(self) -> np.ndarray:
        """Probabilities minus the one-hot label."""
        result = np.exp(self.log_probability)
        result[np.arange(len(self.label)), self.label] -= 1
        return result


def seen(arguments: argparse.Namespace, images: Images, run: int, number: int) -> Seen:
    """Train proxy `number` of a run, or read what it sees from the cache."""
    seed = np.sort(
        np.random.default_rng([run, 11]).permutation(len(images))[
            : round(arguments.share * len(images))
        ]
    )
    own = np.sort(
        np.array_split(np.random.default_rng([run, 12]).permutation(seed), arguments.parts)[number]
    )
    settings = ProxySettings(
        model="small", image_size=images.pixels.shape[-1], epochs=arguments.epochs, batch_size=32, lr=0.05, seed=1000 * run + number, checkpoints=1
    )  # fmt: skip
    name = f"{os.path.basename(arguments.dir or 'digits')}-{arguments.share:g}-{arguments.parts}-{arguments.epochs}-{run}-{number}"
    folder = os.path.join(arguments.cache, f"reproducibility-{name}")
    common.train(settings, images.take(own), folder)
    model = common.final(settings, images.classes, folder)
    with torch.inference_mode():
        embedding = torch.cat([model.embed(pixels) for pixels, _ in images.batches()])
        logits = model.head(embedding)
    return Seen(logits.numpy().astype(np.float64), embedding.numpy(), images.label, own, seed)


def own_loss(of: Seen) -> np.ndarray:
    return -of.log_probability[np.arange(len(of.label)), of.label]


def own_el2n(of: Seen) -> np.ndarray:
    return np.linalg.norm(of.error, axis=1)


def own_margin(of: Seen) -> np.ndarray:
    others = of.logits.copy()
    others[np.arange(len(of.label)), of.label] = -np.inf
    return others.max(1) - of.logits[np.arange(len(of.label)), of.label]


def own_entropy(of: Seen) -> np.ndarray:
    return -(np.exp(of.log_probability) * of.log_probability).sum(1)


def label_rank(of: Seen) -> np.ndarray:
    own = of.logits[np.arange(len(of.label)), of.label]
    return np.log1p((of.logits > own[:, None]).sum(1))


def probe(
    rows: Callable[[Seen], np.ndarray], statistic: str = "loss"
) -> Callable[[Seen], np.ndarray]:
    def score(of: Seen) -> np.ndarray:
        fitted = LinearProbe.fit(of.embedding[rows(of)], of.label[rows(of)], of.logits.shape[1])
        values = fitted.statistics(of.embedding, of.label)[statistic].astype(np.float64)
        return -values if statistic == "margin" else values

    return score


def prototype(of: Seen) -> np.ndarray:
    """Cosine distance from the mean of the class, over all samples."""
    unit = of.embedding / np.linalg.norm(of.embedding, axis=1, keepdims=True)
    mean = np.stack([unit[of.label == y].mean(0) for y in range(of.logits.shape[1])])
    return 1 - (unit * mean[of.label]).sum(1) / np.linalg.norm(mean, axis=1)[of.label]


def neighbours(of: Seen) -> np.ndarray:
    """Share of the nearest samples that have another label."""
    _, rows = NeighbourIndex(of.embedding).search(of.embedding, NEIGHBOURS + 1)
    return (of.label[rows[:, 1:]] != of.label[:, None]).mean(1)


def moso(
    rows: Callable[[Seen], np.ndarray],
    cosine: bool = False,
    balanced: bool = False,
    whitened: bool = False,
) -> Callable[[Seen], np.ndarray]:
    """Alignment of the last layer's gradient with the mean gradient over some rows."""

    def score(of: Seen) -> np.ndarray:
        error, features = of.error, np.c_[of.embedding, np.ones(len(of.label))]
        chosen = rows(of)
        weight = np.ones(len(chosen))
        if balanced:
            weight = 1 / np.bincount(of.label[chosen])[of.label[chosen]]
        weight = weight[:, None] / weight.sum()
        mean = (error[chosen] * weight).T @ features[chosen]
        if whitened:
            second = (error[chosen] ** 2 * weight).T @ features[chosen] ** 2
            mean = mean / (second + 1e-3 * second.mean())
        aligned = ((error @ mean) * features).sum(1)
        lengths = np.linalg.norm(error, axis=1) * np.linalg.norm(features, axis=1)
        return aligned / np.maximum(lengths, 1e-12) if cosine else aligned

    return score


def own(of: Seen) -> np.ndarray:
    return of.own


def held_out(of: Seen) -> np.ndarray:
    return of.held_out


def unseen(of: Seen) -> np.ndarray:
    return of.unseen


CANDIDATES: dict[str, Callable[[Seen], np.ndarray]] = {
    "loss, own last layer": own_loss,
    "EL2N, own last layer": own_el2n,
    "margin, own last layer": own_margin,
    "entropy, own last layer": own_entropy,
    "rank of the label, own last layer": label_rank,
    "distance from the class mean": prototype,
    f"other labels among {NEIGHBOURS} neighbours": neighbours,
    "loss, probe on held-out seed samples": probe(held_out),
    "loss, probe on all unseen samples": probe(unseen),
    "EL2N, probe on all unseen samples": probe(unseen, "distance"),
    "margin, probe on all unseen samples": probe(unseen, "margin"),
    "entropy, probe on all unseen samples": probe(unseen, "entropy"),
    "MoSo, G of the proxy's part": moso(own),
    "MoSo, cosine": moso(own, cosine=True),
    "MoSo, class-balanced G": moso(own, balanced=True),
    "MoSo, whitened G": moso(own, whitened=True),
    "MoSo, whitened G, cosine": moso(own, cosine=True, whitened=True),
    "MoSo, G of held-out seed samples": moso(held_out),
    "MoSo, G of held-out, class-balanced": moso(held_out, balanced=True),
    "MoSo, G of all unseen samples": moso(unseen),
    "MoSo, G of all unseen, class-balanced": moso(unseen, balanced=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.data_options(parser)
    parser.add_argument("--share", type=float, default=0.2, help="size of the seed set")
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--proxies", type=int, default=2, help="that are trained, each on one part")
    parser.add_argument("--epochs", type=int, default=15)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    images, _ = common.load(arguments, 10_000)
    runs = [
        [seen(arguments, images, run, number) for number in range(arguments.proxies)]
        for run in (1, 2)
    ]
    outside = np.setdiff1d(np.arange(len(images)), np.concatenate([run[0].seed for run in runs]))
    label = images.label[outside]
    accuracy = np.mean(
        [(of.logits.argmax(1) == of.label)[of.unseen].mean() for run in runs for of in run]
    )
    print(f"{platform.machine()}; {arguments.dir or 'digits'}, {len(images):,} images, seed set {arguments.share:.0%} in {arguments.parts} parts, "
          f"{arguments.epochs} epochs; accuracy on unseen samples {accuracy:.3f}")  # fmt: skip
    print(
        f"\n{'Spearman between two runs':<42}{'1 proxy':>10}{f'{arguments.proxies} proxies':>12}{'within classes':>16}"
    )
    for name, candidate in CANDIDATES.items():
        scores = [[candidate(of)[outside] for of in run] for run in runs]
        # proxies of one run on one scale
        means = [np.mean([score / score.std() for score in run], axis=0) for run in scores]
        one = spearmanr(scores[0][0], scores[1][0])[0]
        print(
            f"{name:<42}{one:>10.3f}{spearmanr(*means)[0]:>12.3f}{within(*means, label):>16.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
