"""What features of other networks are worth: for extrapolating a score, and for strategies that spread a list over the embeddings.

    python benchmarks/features.py --dir data/cifar10 [--samples 2000] [--seeds 3] [--threads 1]
    python benchmarks/features.py                       the bundled digits

Kinds of features (`embed.model`), always with the statistics of the proxy:

    proxy           the proxy: `small`, trained on other images of the same data set
    other data      `small`, trained on images in other classes: those whose class is in the second half. Lists and scores concern the first
    self-supervised `small`, trained by SimCLR on all images in those other classes, without labels
    random          `small` with the weights that it starts with
    proxy + ...     both side by side, the second with the spread of the first, as raypipe does with `embed.from`

Weights of DINOv2 and the like cannot be downloaded where this ran; the networks stand in for them, and they are far weaker.

Extrapolation: the score is EL2N by a second proxy, trained on images that neither it nor anyone else is judged on. Extrapolators are fitted on
half of the samples and judged on the other half by Spearman's correlation. Strategies: lists of 30 % within classes, accuracy of `small` trained
on them for 30 epochs, on test images. From seed to seed everything differs but the test images. One process, no Ray.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from common import Images, data_options, embed, interval, load, predict, table
from scipy.stats import spearmanr

from raypipe.config import ProxySettings, PseudoLabelSettings
from raypipe.extrapolators.base import Nodes
from raypipe.pseudo_labels.simclr import pretext_network, pretrain
from raypipe.runs.features import spread
from raypipe.runs.ledger import fingerprint
from raypipe.selection import Chunk, SelectionOptions, select
from raypipe.vision.fitting import fit, statistics_of, test

METHODS, STRATEGIES = ("gnn", "knn"), ("d2", "coverage", "typical")
KEEP = 0.3


def settings_of(images: Images, seed: int, epochs: int = 30) -> ProxySettings:
    """How every network is trained."""
    return ProxySettings(
        model="small",
        image_size=images.pixels.shape[-1],
        epochs=epochs,
        batch_size=64,
        checkpoints=1,
        crop_padding=2,
        seed=seed,
    )


def network(
    images: Images, rows: np.ndarray, seed: int, steps: int | None = None
) -> torch.nn.Module:
    """`small`, trained on some rows; with 0 steps as it starts."""
    statistics = statistics_of(images.pixels[rows])
    return fit(
        settings_of(images, seed),
        images.pixels,
        images.label,
        rows,
        images.classes,
        statistics,
        steps=steps,
    ).eval()


def self_supervised(images: Images, rows: np.ndarray, seed: int) -> torch.nn.Module:
    """`small`, trained by SimCLR on some rows, without their labels."""
    pixels = images.pixels[rows]
    model = pretext_network("small", pixels.shape[-1], *statistics_of(pixels), seed)
    pretrain(model, pixels, PseudoLabelSettings(seed=seed), flip=True)
    return model


def beside(first: Nodes, second: Nodes) -> Nodes:
    """Both embeddings side by side, the second with the spread of the first."""
    scale = spread(first.embedding) / spread(second.embedding)
    both = np.concatenate([first.embedding, second.embedding * np.float32(scale)], 1)
    return Nodes(both, first.label, first.signals)


def one_seed(images: Images, held: Images, seed: int) -> dict[tuple[str, str], float]:
    """Fidelity and accuracy of every kind of features, by kind and method or strategy."""
    draw = np.random.default_rng(seed)
    of_interest = images.label < images.classes // 2
    own, others = (draw.permutation(np.flatnonzero(rows)) for rows in (of_interest, ~of_interest))
    # a third for each: what is judged, the proxy, and the proxy that measures the score
    judged, first, second = np.array_split(own, 3)
    samples = Images(images.pixels[judged], images.label[judged], images.classes)
    proxy, scorer = network(images, first, seed), network(images, second, seed + 100)
    seen = embed(proxy, samples)
    kinds = {"proxy": seen}
    for name, model in (
        ("other data", network(images, others[: len(first)], seed + 200)),
        ("self-supervised", self_supervised(images, others, seed + 250)),
        ("random", network(images, first, seed + 300, steps=0)),
    ):
        nodes = embed(model, samples)
        kinds[name] = Nodes(nodes.embedding, seen.label, seen.signals)
    alone = tuple(kinds)
    kinds |= {f"proxy + {name}": beside(seen, kinds[name]) for name in alone[1:]}
    with torch.inference_mode():
        logits = torch.cat([scorer(pixels) for pixels, _ in samples.batches()])
    target = torch.nn.functional.one_hot(torch.from_numpy(samples.label), images.classes)
    score = (logits.softmax(1) - target).norm(dim=1).numpy()
    half = len(judged) // 2
    fitted, rest = np.arange(half), np.arange(half, len(judged))
    test_rows = held.label < images.classes // 2
    result: dict[tuple[str, str], float] = {}
    for kind, nodes in kinds.items():
        for method in METHODS:
            predicted = predict(method, nodes, fitted, score[fitted], rest, images.classes, seed)
            result[kind, method] = float(spearmanr(predicted, score[rest]).statistic)
        chunk = Chunk(
            score.astype(np.float32),
            samples.label.astype(np.int32),
            [f"{row:06d}" for row in judged],
            seen.signals[:, 0].astype(np.float32),
            position=0,
        )
        for strategy in STRATEGIES if kind in alone else ():
            options = SelectionOptions(by_class=True, seed=seed)
            (cut,) = select(
                lambda _, chunk=chunk: [chunk],
                [KEEP],
                strategy,
                images.classes,
                options,
                embedded=lambda chunk=chunk, nodes=nodes: [(chunk, nodes.embedding)],
            )
            rows = np.flatnonzero(cut.mask(chunk))
            model = network(samples, rows, seed + 400)
            accuracy = test(model, held.pixels[test_rows], held.label[test_rows], images.classes)
            result[kind, strategy] = accuracy.accuracy
    rows = draw.permutation(len(judged))[: round(KEEP * len(judged))]
    model = network(samples, np.sort(rows), seed + 400)
    found = test(model, held.pixels[test_rows], held.label[test_rows], images.classes)
    result["random list", "any"] = found.accuracy
    return result


def kept_results(
    arguments: argparse.Namespace, images: Images, held: Images
) -> list[dict[tuple[str, str], float]]:
    """Results of every seed. Those in the cache are not computed again."""
    results = []
    for seed in range(arguments.seeds):
        what = fingerprint(arguments.dir, len(images), len(held), arguments.image_size, seed)
        path = Path(arguments.cache, f"features-{what}.json")
        if not path.exists():
            found = one_seed(images, held, seed)
            path.write_text(json.dumps([[*key, value] for key, value in found.items()]))
        results.append({(kind, of): value for kind, of, value in json.loads(path.read_text())})
    return results


def cell(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    data_options(parser)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images, held = load(arguments, 2000)
    results = kept_results(arguments, images, held)
    judged = sum(images.label < images.classes // 2) // 3
    print(
        f"{platform.machine()}, {arguments.threads} thread(s); {len(images.label):,} images, of which "
        f"{judged:,} are judged, {arguments.seeds} seeds, ± half the width of a 95 % t interval"
    )
    kinds = list(dict.fromkeys(kind for kind, _ in results[0]))[:-1]
    table(
        "Spearman's correlation of predicted scores with measured ones, outside the fit",
        ["features", *METHODS],
        [(k, [cell([r[k, m] for r in results]) for m in METHODS]) for k in kinds],
    )
    table(
        f"Accuracy with lists of {KEEP:.0%} within classes, less that with a random list of the same size",
        ["features", *STRATEGIES],
        [
            (k, [cell([r[k, s] - r["random list", "any"] for r in results]) for s in STRATEGIES])
            for k in kinds
            if (k, STRATEGIES[0]) in results[0]
        ],
    )
    print(f"\nAccuracy with a random list: {cell([r['random list', 'any'] for r in results])}")


if __name__ == "__main__":
    main()
