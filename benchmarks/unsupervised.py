"""How scores by pseudo-labels rank samples, beside scores by true labels: EL2N, MoSo, TDDS and Dynamic Uncertainty.

    python benchmarks/unsupervised.py DATA [--samples 2000] [--image-size 16] [--epochs 16] [--pretrain 16] [--clusters 10] [--cache DIR]

DATA is a folder of Parquet files with labels, or `digits` for the bundled set. True labels train the supervised runs and judge the clusters,
and nothing else. A network is trained on the images alone (SimCLR, as the stage `label` does it), its embeddings are clustered, and the
proxy is trained and the scores are measured under the clusters' labels as they are under the true ones, on the same samples. Tables:

1. How well clusters agree with the true classes: adjusted Rand index, and the accuracy of the best assignment of clusters to classes. Of
   spherical k-means and TURTLE on the self-supervised embeddings; beside them plain k-means of the same, and spherical k-means of an untrained
   network's embeddings and of pixels.
2. Spearman's correlation of two runs' scores, and the overlap of the top 30 % and 50 % (by chance 0.30 and 0.50): of two supervised runs that
   differ in their random seed, which is the most that can be hoped for; of the supervised run with runs by pseudo-labels; of two of these.

No two proxies begin with the same weights. What was trained and measured is kept below --cache and not done again. One process, no Ray.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import numpy as np
import torch
from common import Images, names_of, read, save
from fidelity_runs import Study
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from raypipe.assessment.rank_agreement import spearman
from raypipe.config import MeasureSettings, ProxySettings, PseudoLabelSettings, SourceSettings
from raypipe.pseudo_labels.clusters import Clusters, kmeans
from raypipe.pseudo_labels.labeller import features
from raypipe.pseudo_labels.simclr import pretext, pretrain
from raypipe.pseudo_labels.turtle import turtle
from raypipe.runs.ledger import fingerprint
from raypipe.vision.devices import AdaptiveBatch

SCORES = "el2n,moso,tdds,dynamic-uncertainty"
TOPS = (0.3, 0.5)
PSEUDO_SEED = 10
"""Runs by pseudo-labels have seeds from here on, those by true labels from 0 on."""


def matched(cluster: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Whether a sample's class is the one that its cluster stands for, in the assignment that has most such samples: bool [n]."""
    size = max(cluster.max(), label.max()) + 1
    table = np.zeros((size, size), np.int64)
    np.add.at(table, (cluster, label), 1)
    rows, columns = linear_sum_assignment(-table)
    assigned = np.empty(size, np.int64)
    assigned[rows] = columns
    return assigned[cluster] == label


def agreement(a: np.ndarray, b: np.ndarray) -> str:
    """Spearman and overlaps of the tops of two scores, as a row."""
    found = [spearman(a, b) or 0.0]
    for top in TOPS:
        count = round(top * len(a))
        best = [set(np.argsort(-score, kind="stable")[:count].tolist()) for score in (a, b)]
        found.append(len(best[0] & best[1]) / count)
    return "".join(f"{value:>12.3f}" for value in found)


def embedded(
    images: Images, proxy: ProxySettings, settings: PseudoLabelSettings, folder: str
) -> dict[str, np.ndarray]:
    """Embeddings of all images before and after self-supervised training, and the seconds it took."""
    path = os.path.join(
        folder,
        f"self-supervised-{fingerprint(settings.model_dump(), proxy.model, proxy.image_size)}.npz",
    )
    if not os.path.exists(path):
        mean, std = images.pixels.mean((0, 2, 3)) / 255, images.pixels.std((0, 2, 3)) / 255
        network = pretext(
            proxy.model,
            proxy.image_size,
            mean.tolist(),
            np.maximum(std, 1e-3).tolist(),
            settings.seed,
        )
        untrained = features(network.eval(), images.pixels, AdaptiveBatch(64))
        began = time.perf_counter()
        pretrain(network, images.pixels, settings, flip=proxy.flip)
        seconds = time.perf_counter() - began
        save(
            path,
            untrained=untrained,
            trained=features(network, images.pixels, AdaptiveBatch(64)),
            seconds=np.array(seconds),
        )
    with np.load(path) as found:
        return dict(found)


def clusterings(
    images: Images, found: dict[str, np.ndarray], settings: PseudoLabelSettings
) -> dict[str, np.ndarray]:
    """Cluster of every sample, int64 [n], by how it was found."""
    count = settings.clusters or images.classes
    pixels = images.pixels.reshape(len(images), -1).astype(np.float32)

    def by_kmeans(given: np.ndarray) -> Clusters:
        return kmeans(given, count, restarts=settings.restarts, iterations=100, seed=settings.seed)

    by_turtle = turtle(
        found["trained"], count, steps=1000, gamma=settings.gamma, seed=settings.seed
    )
    plain = KMeans(count, n_init=settings.restarts, random_state=settings.seed)
    return {
        "k-means, self-supervised": by_kmeans(found["trained"])(found["trained"]),
        "TURTLE, self-supervised": by_turtle(found["trained"]),
        "plain k-means, self-supervised": plain.fit_predict(found["trained"]).astype(np.int64),
        "k-means, untrained network": by_kmeans(found["untrained"])(found["untrained"]),
        "k-means, pixels": by_kmeans(pixels)(pixels),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="folder of Parquet files, or digits")
    add("--include", default="train-*", help="which files of the folder")
    add("--samples", type=int, default=2000, help="drawn from the data")
    add(
        "--image-size",
        type=int,
        default=16,
        help="pixels; 16 so that all of it is minutes of one core",
    )
    add("--model", default="small", help="as proxy.model")
    add("--epochs", type=int, default=16, help="of the proxy")
    add("--checkpoints", type=int, default=4)
    add("--pretrain", type=int, default=16, help="epochs of self-supervised training")
    add("--clusters", type=int, help="default: as many as there are classes")
    add(
        "--method",
        choices=("kmeans", "turtle"),
        default="kmeans",
        help="what gives the pseudo-labels of the second table",
    )
    add("--scores", type=names_of, default=names_of(SCORES))
    add("--cache", default="/tmp/raypipe-unsupervised")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    digits = arguments.data == "digits"
    source = (
        SourceSettings(uri="digits://")
        if digits
        else SourceSettings(uri=arguments.data, include=arguments.include)
    )
    size = arguments.image_size
    images = read(source, size, arguments.samples)
    # a mirrored digit is no digit
    augmentation = {"flip": False, "crop_padding": 1} if digits else {}
    proxy = ProxySettings(
        model=arguments.model,
        image_size=size,
        epochs=arguments.epochs,
        checkpoints=arguments.checkpoints,
        **augmentation,
    )
    settings = PseudoLabelSettings(
        clusters=arguments.clusters or images.classes, epochs=arguments.pretrain
    )
    data = fingerprint(
        source.model_dump(mode="json"), size, arguments.samples, proxy.model_dump(mode="json")
    )
    folder = os.path.join(arguments.cache, data)
    os.makedirs(folder, exist_ok=True)
    name = "digits" if digits else os.path.basename(source.uri.rstrip("/"))
    print(
        f"{platform.machine()}, 1 thread, torch {torch.__version__}; {name}: {len(images)} samples of {images.classes} classes; proxy "
        f"{proxy.model} at {size} pixels, {proxy.epochs} epochs, {proxy.checkpoints} checkpoints; {settings.epochs} epochs self-supervised"
    )
    found = embedded(images, proxy, settings, folder)
    clusters = clusterings(images, found, settings)
    print(
        f"\n1. {settings.clusters} clusters and the true classes; self-supervised training took {float(found['seconds']):.0f} s"
    )
    print(f"{'':<34}{'ARI':>8}{'accuracy':>10}{'smallest':>10}{'largest':>10}")
    for how, cluster in clusters.items():
        sizes = np.bincount(cluster, minlength=settings.clusters or 0)
        right = matched(cluster, images.label).mean()
        print(
            f"{how:<34}{adjusted_rand_score(images.label, cluster):>8.3f}{right:>10.3f}{sizes.min():>10}{sizes.max():>10}"
        )

    chosen = clusters[
        next(how for how in clusters if how.lower().replace("-", "").startswith(arguments.method))
    ]
    own = Images(images.pixels, chosen, settings.clusters or images.classes)
    named = f"pseudo-{arguments.method}-{fingerprint(settings.model_dump())}"
    measure = MeasureSettings()
    true = Study(images, proxy, measure, os.path.join(folder, "true"), 1, False)
    pseudo = Study(own, proxy, measure, os.path.join(folder, named), 1, False)
    good = matched(chosen, images.label)
    print(
        "\n2. Agreement of scores, Spearman and overlap of the tops; the last row is of the samples whose cluster stands for their class"
    )
    for score in arguments.scores:
        first, second = (true.measured(true.full(seed), score) for seed in (0, 1))
        by_clusters, again = (
            pseudo.measured(pseudo.full(PSEUDO_SEED + seed), score) for seed in (0, 1)
        )
        print(f"\n{score:<34}{'Spearman':>12}" + "".join(f"{f'top {top:.0%}':>12}" for top in TOPS))
        print(f"{'supervised, another seed':<34}{agreement(first, second)}")
        print(f"{'pseudo-labels':<34}{agreement(first, by_clusters)}")
        print(f"{'pseudo-labels, other seeds':<34}{agreement(second, again)}")
        print(f"{'pseudo-labels among themselves':<34}{agreement(by_clusters, again)}")
        print(
            f"{'pseudo-labels, where they match':<34}{agreement(first[good], by_clusters[good])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
