"""The mathematics of a run in one process: no Ray, no files between stages, nothing that could be resumed. For `pipeline.py`.

    python benchmarks/pipeline_plain.py CONFIG.yaml OUT.json [--threads 2] [--floor]

Reads the source once into memory, draws seed and audit set at random (as many as a run does), trains the proxy with torch alone, measures
MoSo at its checkpoints, embeds everything, fits and judges the extrapolator, predicts, and cuts keep-lists. OUT.json has seconds and
processor seconds by the names of a run's stages, and the peak of memory.
With --floor only decoding, training and the forward pass over all images.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import Images, checkpoints, embed, final, last_layer, mean_gradient, train

from raypipe.assessment.fidelity import compare
from raypipe.assessment.held_out import HeldOutPredictions, hold_out, predict, split
from raypipe.assessment.intervals import Intervals
from raypipe.assessment.learning_curve import learning_curve
from raypipe.config import Config, load_config
from raypipe.extrapolators import make
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.blend import MEMBERS
from raypipe.extrapolators.published.gnn import GnnPublished
from raypipe.runs.sizes import PUBLISHED_SAMPLES, QUICK_FOLDS_AUDIT
from raypipe.scores.calibration import recalibrate
from raypipe.scores.forward_mode import Aligner
from raypipe.scores.moso import add_one_in, combine, leave_one_out
from raypipe.scores.per_sample import norms_and_alignments
from raypipe.sources import class_map, open_source
from raypipe.vision.decode import decode_batch
from raypipe.vision.training import steps_per_epoch

AT_ONCE = 1024
"""Samples scored in one piece."""
RECALIBRATION_BATCH = 256


class Clock:
    """Seconds and processor seconds of named pieces of work."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, seconds = time.perf_counter(), time.process_time()
        yield
        self.wall[name], self.seconds[name] = (
            time.perf_counter() - wall,
            time.process_time() - seconds,
        )


def run(config: Config, clock: Clock, threads: int, floor: bool) -> dict[str, Any]:
    """Do it; returns what there is to say of the result."""
    torch.set_num_threads(threads)
    settings, rng = config.proxy, np.random.default_rng(config.seed.seed)
    with clock("decode"):
        images = read(config)
    count = len(images)
    order = rng.permutation(count)
    rows, others = np.split(order, [round(config.seed.fraction * count)])
    audited = others[: config.seed.audit_samples(count)]
    seed = images.take(rows)
    with tempfile.TemporaryDirectory() as folder:
        with clock("proxy"):
            train(settings, seed, folder)
        if not floor:
            with clock("measure"):
                score, of_audit = measure(config, images, rows, audited, folder)
        with clock("embed"):
            nodes = embed(final(settings, images.classes, folder), images)
        head = last_layer(settings, folder)
    if floor:
        return {"samples": count, "measured": len(rows)}
    torch.set_num_threads(1)
    with clock("extrapolate"):
        predicted, spearman = extrapolate(
            config, nodes, rows, score, audited, of_audit, images.classes, head
        )
    with clock("select"):
        lists = [keep_list(predicted, images.label, fraction) for fraction in config.select.keep]
    return {
        "samples": count,
        "measured": len(rows),
        "spearman": spearman,
        "kept": [len(one) for one in lists],
    }


def read(config: Config) -> Images:
    """The first samples of the source, as many as `source.limit` says, without those that cannot be used."""
    settings = config.source
    source, left = open_source(settings), settings.limit or 2**62
    pixels, labels, names, known = [], [], None, set()
    for file in source.files():
        scan = source.scan(file)
        names, known = scan.class_names or names, known | set(scan.labels)
        for fragment in scan.fragments:
            samples = list(itertools.islice(source.read(fragment), left))
            left -= len(samples)
            decoded, reasons = decode_batch(samples, config.proxy.image_size, settings.max_pixels)
            good = [not reason for reason in reasons]
            pixels.append(decoded[good])
            labels += [sample.label for sample, fine in zip(samples, good, strict=True) if fine]
        if not left:
            break
    classes = class_map(names, frozenset(known), settings.num_classes)
    label = np.array([classes.index(one)[0] for one in labels], np.int64)
    return Images(np.concatenate(pixels)[label >= 0], label[label >= 0], len(classes.names))


def measure(
    config: Config, images: Images, rows: np.ndarray, audited: np.ndarray, folder: str
) -> tuple[np.ndarray, np.ndarray]:
    """MoSo of the seed set and of the audit set."""
    settings, moso, seed = config.proxy, config.measure.moso, images.take(rows)
    both, count = images.take(np.concatenate([rows, audited])), len(rows)
    own = moso.uses_self_term(count)
    aligned, squares, rates = [], [], []
    for _, rate, model in checkpoints(settings, images.classes, folder):
        if config.measure.recalibrate:
            recalibrate(model, (pixels for pixels, _ in seed.batches(RECALIBRATION_BATCH)))
        gradient = mean_gradient(model, seed)
        if own:
            found = [
                norms_and_alignments(model, pixels, label, gradient)
                for pixels, label in both.batches()
            ]
            squares.append(np.concatenate([square.numpy() for square, _ in found]))
            aligned.append(np.concatenate([one.numpy() for _, one in found]))
        else:
            aligner = Aligner(model, gradient)
            aligned.append(
                np.concatenate([aligner(pixels, label).numpy() for pixels, label in both.batches()])
            )
        rates.append(rate)
    found, steps = (
        np.stack(aligned, 1).astype(np.float64),
        steps_per_epoch(count, settings.batch_size) * settings.epochs,
    )
    spread = found[:count].std(0)
    if own:
        square, mean = np.stack(squares, 1).astype(np.float64), found[:count].mean(0)
        inside, length = add_one_in(found[count:], square[count:], count, mean)
        found[:count] = leave_one_out(found[:count], square[:count], count, moso.formula, mean)
        found[count:] = leave_one_out(inside, square[count:], count + 1, moso.formula, length)
    score = combine(found, np.array(rates), moso.weights, steps=steps, samples=count, spread=spread)
    return score[:count], score[count:]


def extrapolate(
    config: Config,
    nodes: Nodes,
    rows: np.ndarray,
    score: np.ndarray,
    audited: np.ndarray,
    of_audit: np.ndarray,
    classes: int,
    head: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, float | None]:
    """Every score, float32 [n], and the fidelity on the audit set; what `raypipe.stages.extrapolate` computes."""
    settings, seed, audit = config.extrapolate, nodes.take(rows), nodes.take(audited)

    quick = len(audited) >= QUICK_FOLDS_AUDIT

    def fresh(members: int = MEMBERS) -> Any:
        model: Any = make(settings, classes)
        model.head, model.members = head, members
        return model

    model = fresh()
    model.fit(seed, score)
    parts = [
        hold_out(lambda: fresh(1 if quick else MEMBERS), seed, score, held, mlp=not quick)
        for held in split(
            len(rows), settings.holdout, settings.folds_of(len(rows), classes), settings.seed
        )
    ]
    found, judged = HeldOutPredictions.concat(parts), predict(model, seed, score, audit, of_audit)
    if settings.judge_published is True or (
        settings.judge_published == "auto" and len(nodes) <= PUBLISHED_SAMPLES
    ):
        published = GnnPublished(
            settings.model_copy(
                update={"method": "gnn-published", "epochs": "auto", "neighbours": "auto"}
            ),
            classes,
        )
        published.fit_graph(nodes, rows, score)
        judged.baselines["gnn_published"] = published.predict_rows(audited).astype(np.float64)
    learning_curve(seed, score, audit, of_audit, settings.seed)
    compare(found, settings.seed, config.select.keep)
    fidelity = compare(judged, settings.seed, config.select.keep)
    intervals = Intervals.fit(found.calibration(), settings.confidence, judged.calibration())
    result = np.empty(len(nodes), np.float32)
    for start in range(0, len(nodes), AT_ONCE):
        part = np.arange(start, min(start + AT_ONCE, len(nodes)))
        result[part], doubt = model.predict_with_doubt(nodes.take(part))
        intervals.around(result[part], doubt, nodes.label[part])
    result[rows], result[audited] = score, of_audit
    return result, fidelity.spearman


def keep_list(score: np.ndarray, label: np.ndarray, fraction: float) -> np.ndarray:
    """Rows of the highest scores of each class, the same share of all."""
    parts = [np.flatnonzero(label == y) for y in np.unique(label)]
    return np.concatenate(
        [own[np.argsort(-score[own], kind="stable")[: round(fraction * len(own))]] for own in parts]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--floor", action="store_true")
    arguments = parser.parse_args()
    clock = Clock()
    found = run(load_config(arguments.config), clock, arguments.threads, arguments.floor)
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(arguments.out, "w") as file:
        json.dump({"wall": clock.wall, "seconds": clock.seconds, "memory": memory, **found}, file)


if __name__ == "__main__":
    main()
