"""What several benchmarks need: images in memory, a proxy trained on them in this process without Ray, and fits of extrapolators.

A training writes into a folder, epoch by epoch, and goes on there when it was stopped; batches, augmentation and learning rates are those
of `raypipe.vision.training`, so that it is the training of the proxy stage with one worker.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.stats import t as student
from torch import Tensor

from raypipe.config import ExtrapolateSettings, ProxySettings, SourceSettings
from raypipe.config.choices import PROXY_STATISTICS
from raypipe.errors import RaypipeError
from raypipe.extrapolators import make
from raypipe.extrapolators.base import Nodes, TransductiveExtrapolator
from raypipe.extrapolators.blend import AnchorGnn
from raypipe.proxies.networks import ProxyNet, build_network
from raypipe.runs.ledger import fingerprint
from raypipe.scores.moso import gradient_sum
from raypipe.scores.trajectory import STATISTICS
from raypipe.sources import class_map, open_source
from raypipe.vision import training
from raypipe.vision.adversarial import attack, starting_points
from raypipe.vision.decode import decode_batch
from raypipe.vision.output_statistics import output_statistics

BATCH = 64
"""Images in one pass that only measures, as the stages take them on a CPU."""
BASELINES = ("class_mean", "proxy_loss", "random")
"""What `predict` knows beside the extrapolators."""


RANDOM, FULL = "random", "full"
"""Lists that need no score."""


class Missing(Exception):
    """Something is not in the cache, and only what is there is wanted."""


@dataclass(frozen=True)
class Images:
    """Decoded samples: pixels uint8 [n, 3, size, size], label int64 [n], and the number of classes."""

    pixels: np.ndarray
    label: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray | slice) -> Images:
        return Images(self.pixels[rows], self.label[rows], self.classes)

    def batches(self, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and labels, in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield torch.from_numpy(self.pixels[part]), torch.from_numpy(self.label[part])


def read(settings: SourceSettings, size: int, limit: int | None = None) -> Images:
    """The first `limit` samples of a seeded shuffle of a source, without those that have no label or cannot be decoded."""
    return read_named(settings, size, limit)[0]


def read_named(
    settings: SourceSettings, size: int, limit: int | None = None
) -> tuple[Images, list[str]]:
    """The same, with the ids of the samples."""
    source = open_source(settings)
    scans = [source.scan(file) for file in source.files()]
    fragments = [fragment for scan in scans for fragment in scan.fragments]
    names = next((scan.class_names for scan in scans if scan.class_names is not None), None)
    classes = class_map(
        names, frozenset(label for scan in scans for label in scan.labels), settings.num_classes
    )
    total = sum(fragment.samples for fragment in fragments)
    order = np.random.default_rng(0).permutation(total)[:limit]
    place = np.full(total, -1)
    place[order] = np.arange(len(order))
    pixels, label = np.empty((len(order), 3, size, size), np.uint8), np.full(len(order), -1)
    ids = np.empty(len(order), object)
    first = 0
    for fragment in fragments:
        own = place[first : first + fragment.samples]
        chosen = [
            sample
            for sample, position in zip(source.read(fragment), own, strict=True)
            if position >= 0
        ]
        decoded, reasons = decode_batch(chosen, size, settings.max_pixels)
        pixels[own[own >= 0]] = decoded
        ids[own[own >= 0]] = [sample.sample_id for sample in chosen]
        label[own[own >= 0]] = [
            -1 if bad else classes.index(sample.label)[0] for sample, bad in zip(chosen, reasons)
        ]
        first += fragment.samples
    good = label >= 0
    if not good.any():
        raise RaypipeError(
            f"{settings.uri}: none of {len(order)} samples has a readable image and a label"
        )
    return Images(pixels[good], label[good], len(classes.names)), ids[good].tolist()


def data_options(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks over a data set with a test part, or the bundled digits: what `load` needs, cache and threads."""
    add = parser.add_argument
    add("--dir", help="folder of Parquet files; default: the bundled digits")
    add("--include", default="train-*", help="which files of the folder are for training")
    add("--test-include", default="test-*", help="which are for the test")
    add("--samples", type=int, help="drawn for training")
    add("--test-samples", type=int, help="drawn for the test; default: all")
    add("--image-size", type=int, default=16)
    add("--cache", default="/tmp/raypipe-benchmarks")
    add("--threads", type=int, default=1)
    add("--only-cached", action="store_true", help="only print what is there")


def load(arguments: argparse.Namespace, samples: int) -> tuple[Images, Images]:
    """Training and test part, decoded once; so many samples for training where none are asked for, of the digits at most 1400."""
    count = arguments.samples or (samples if arguments.dir else min(samples, 1400))
    what = fingerprint(arguments.dir, count, arguments.test_samples, arguments.image_size)
    path = os.path.join(arguments.cache, f"images-{what}.npz")
    os.makedirs(arguments.cache, exist_ok=True)
    if not os.path.exists(path):
        if arguments.dir is None:
            every = read(SourceSettings(uri="digits://", format="digits"), arguments.image_size)
            parts = every.take(slice(count)), every.take(slice(count, None))
        else:
            sources = [
                SourceSettings(
                    uri=os.path.abspath(arguments.dir), format="parquet", include=include
                )
                for include in (arguments.include, arguments.test_include)
            ]
            limits = (count, arguments.test_samples)
            parts = tuple(
                read(source, arguments.image_size, limit) for source, limit in zip(sources, limits)
            )
        names = ("pixels", "label")
        arrays = {
            f"{which}_{name}": getattr(part, name)
            for which, part in zip(("train", "test"), parts)
            for name in names
        }
        save(path, **arrays, classes=np.array(parts[0].classes))
    with np.load(path) as found:
        train, test = (
            Images(found[f"{which}_pixels"], found[f"{which}_label"], int(found["classes"]))
            for which in ("train", "test")
        )
    return train, test


def of_all(seeds: Sequence[Any], figure: Callable[[Any], Any]) -> list[Any]:
    """A figure of every seed for which it is not missing."""
    found = []
    for seed in seeds:
        with contextlib.suppress(Missing):
            found.append(figure(seed))
    return found


def plain_list(name: str, keep: float, count: int, seed: int) -> np.ndarray:
    """Rows of the lists RANDOM and FULL of `count` samples, int64, rising."""
    if name == FULL:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, 7]).permutation(count)[: round(keep * count)])


def save(path: str, **arrays: np.ndarray) -> None:
    """Write arrays; a file that is there is whole, whatever was interrupted."""
    temporary = f"{path}.{os.getpid()}.npz"
    np.savez(temporary, **arrays)
    os.replace(temporary, path)


def train(settings: ProxySettings, images: Images, folder: str) -> None:
    """Train a proxy on images, or go on where the training in `folder` stopped.

    Writes for every epoch `epoch-<number>.npz` (rate, the learning rate at its end; numbers [n, 4], those of NUMBERS, and
    probabilities [n, classes] of the training's forward pass), and the weights after epochs that have a checkpoint.
    Raises RaypipeError when the loss is not finite.
    """
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(settings.seed)
    mean, std = images.pixels.mean((0, 2, 3)) / 255, images.pixels.std((0, 2, 3)) / 255
    model = fresh_proxy(settings, images.classes, mean.tolist(), np.maximum(std, 1e-3).tolist())
    optimizer, first = training.make_optimizer(settings, model), 0
    state_file = os.path.join(folder, "state.safetensors")
    if os.path.exists(state_file):
        state = load_file(state_file)
        first = int(state.pop("epoch")) + 1
        training.restore_training(state, model, optimizer)
    count, kept = len(images), settings.checkpoint_epochs()
    per_epoch = training.steps_per_epoch(count, settings.batch_size)
    for epoch in range(first, settings.passes):
        model.train()
        said = np.empty((count, len(STATISTICS)), np.float32)
        probabilities = np.empty((count, images.classes), np.float16)
        for step, rows in enumerate(
            training.epoch_batches(count, settings.batch_size, settings.seed, epoch)
        ):
            rate = training.learning_rate(
                settings, epoch * per_epoch + step, per_epoch * settings.passes
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            augmented = training.augment(images.pixels[rows], settings, epoch, step, slice(None))
            pixels = training.shrink(torch.from_numpy(augmented), settings.size_in_epoch(epoch))
            target = torch.from_numpy(images.label[rows])
            if settings.adversary is not None:
                begin = starting_points(pixels.shape, settings.seed, epoch, 1 + step, 1)
                pixels = attack(model, pixels, target, settings.adversary, begin)
            optimizer.zero_grad(set_to_none=True)
            logits = model(pixels)
            F.cross_entropy(logits, target, label_smoothing=settings.label_smoothing).backward()
            optimizer.step()
            with torch.no_grad():
                said[rows] = _stacked(logits, target, STATISTICS)
                probabilities[rows] = logits.softmax(1).half().numpy()
        if not np.isfinite(said).all():
            raise RaypipeError(
                f"the proxy's loss is not finite in epoch {epoch + 1}; lower the learning rate"
            )
        if epoch in kept:
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            save_file(weights, _file(folder, epoch, "safetensors"))
        save(
            _file(folder, epoch, "npz"),
            rate=np.array(rate),
            numbers=said,
            probabilities=probabilities,
        )
        state = training.training_state(model, optimizer) | {"epoch": torch.tensor(epoch)}
        save_file(state, f"{state_file}.{os.getpid()}")
        os.replace(f"{state_file}.{os.getpid()}", state_file)


def checkpoints(
    settings: ProxySettings, classes: int, folder: str
) -> Iterator[tuple[int, float, ProxyNet]]:
    """Epoch, learning rate and network of every checkpoint of a finished training, in the order of training."""
    for epoch in settings.checkpoint_epochs():
        model = fresh_proxy(settings, classes)
        model.load_state_dict(load_file(_file(folder, epoch, "safetensors")))
        with np.load(_file(folder, epoch, "npz")) as written:
            rate = float(written["rate"])
        yield epoch, rate, model.eval()


def final(settings: ProxySettings, classes: int, folder: str) -> ProxyNet:
    """The network after the last checkpoint of a finished training; only the choice `spaced` has that at the end."""
    *_, (_, _, model) = checkpoints(settings, classes, folder)
    return model


def trajectory_of(settings: ProxySettings, folder: str) -> dict[str, np.ndarray]:
    """What `raypipe.scores.trajectory.Trajectory.from_recorded` takes: by name float32 [epochs, n], probabilities float32 [epochs, n, classes]."""
    said, probabilities = [], []
    for epoch in range(settings.passes):
        with np.load(_file(folder, epoch, "npz")) as written:
            said.append(written["numbers"])
            probabilities.append(written["probabilities"].astype(np.float32))
    stacked = np.stack(said)
    return {name: stacked[:, :, column] for column, name in enumerate(STATISTICS)} | {
        "probabilities": np.stack(probabilities)
    }


def mean_gradient(
    model: ProxyNet,
    images: Images,
    rule: Callable[[ProxyNet, Tensor, Tensor], dict[str, Tensor]] = gradient_sum,
) -> dict[str, Tensor]:
    """Mean gradient over the images; `rule` gives the sum over a batch."""
    total: dict[str, Tensor] = {}
    for pixels, label in images.batches():
        for name, value in rule(model, pixels, label).items():
            total[name] = total[name] + value if name in total else value
    return {name: value / len(images) for name, value in total.items()}


def embed(model: ProxyNet, images: Images) -> Nodes:
    """The images as the extrapolators see them."""
    model.eval()
    embeddings, signals = [], []
    with torch.inference_mode():
        for pixels, label in images.batches():
            embedding = model.embed(pixels)
            embeddings.append(embedding.numpy())
            signals.append(_stacked(model.head(embedding), label, PROXY_STATISTICS))
    return Nodes(np.concatenate(embeddings), images.label, np.concatenate(signals))


def outputs(model: ProxyNet, images: Images) -> np.ndarray:
    """NUMBERS of every image by the network in eval mode: float32 [n, 4]."""
    model.eval()
    with torch.inference_mode():
        return np.concatenate(
            [_stacked(model(pixels), label, STATISTICS) for pixels, label in images.batches()]
        )


def last_layer(settings: ProxySettings, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight [classes, d] and bias [classes] of the network that `final` gives."""
    weights = load_file(_file(folder, settings.checkpoint_epochs()[-1], "safetensors"))
    return weights["head.weight"].numpy(), weights["head.bias"].numpy()


def predict(
    method: str,
    everything: Nodes,
    rows: np.ndarray,
    score: np.ndarray,
    wanted: np.ndarray,
    classes: int,
    seed: int = 0,
    head: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """What a method fitted on the scores, float [m], of the samples at `rows` predicts for those at `wanted`: float [w].

    method  an extrapolator with its default settings, or one of BASELINES: the mean of the class, the proxy's loss, random numbers
    head    the last layer of the proxy that sees the samples so
    """
    if method == "proxy_loss":
        return everything.signals[wanted, 0]
    if method == "random":
        return np.random.default_rng(seed).random(len(wanted))
    if method == "class_mean":
        label = everything.label[rows]
        mean = {int(y): score[label == y].mean() for y in np.unique(label)}
        return np.array([mean.get(int(y), score.mean()) for y in everything.label[wanted]])
    model = make(ExtrapolateSettings.model_validate({"method": method}), classes)
    if isinstance(model, TransductiveExtrapolator):
        model.fit_graph(everything, rows, score)
        return model.predict_rows(wanted)
    if isinstance(model, AnchorGnn):
        model.head = head
    model.fit(everything.take(rows), score)
    return model.predict(everything.take(wanted))


def names_of(text: str) -> list[str]:
    """Of an option: a,b,c."""
    return text.split(",")


def shares_of(text: str) -> list[float]:
    """Of an option: 0.05,0.1."""
    return [float(part) for part in text.split(",")]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t distribution; not a number for fewer than two values."""
    if len(values) < 2:
        return (values[0] if values else np.nan), np.nan
    reach = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(reach)


def shown(values: Sequence[float | None], form: str = "{:.1f}") -> str:
    """A share in percent, mean and half the width of its interval; empty without values."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    mean, reach = interval(known)
    return form.format(mean) + (f" ± {reach:.1f}" if np.isfinite(reach) else "")


def table(title: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |")


def fresh_proxy(settings: ProxySettings, classes: int, *statistics: list[float]) -> ProxyNet:
    """With weights from the global generator, laid out as convolutions prefer; statistics: mean and spread of the pixels."""
    return build_network(settings.model, classes, settings.image_size, *statistics).to(
        memory_format=torch.channels_last
    )


def _stacked(logits: Tensor, label: Tensor, names: Sequence[str]) -> np.ndarray:
    found = output_statistics(logits, label)
    return torch.stack([found[name] for name in names], 1).numpy()


def _file(folder: str, epoch: int, kind: str) -> str:
    return os.path.join(folder, f"epoch-{epoch:04d}.{kind}")
