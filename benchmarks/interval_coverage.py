"""How often the intervals of predicted scores hold: overall, for extreme predictions and far from the seed set.

    python benchmarks/interval_coverage.py [--dir DATA] [--samples 10000] [--share 0.2] [--epochs 20] [--cache DIR]

Without --dir, the bundled digits. A proxy is trained on a random share of the samples, the seed set. MoSo is measured on it, on an
audit set as a run draws it (a tenth of the seed set, 50 to 500 samples), on at least 300 further samples, and on the 200 samples with
the most extreme predictions. The default extrapolator is fitted on the seed set. Printed are

    the error       Pearson, Spearman and RMSE on the further samples and on the extreme ones, and the ranges of scores
    the coverage    of the intervals at 90 and 95 %: of all further samples, of the tenth of them with the most extreme predictions, and
                    of the tenth farthest from the seed set. Each is the mean, and the standard deviation, over draws of the audit set
                    from the audit set and the further samples; the remaining samples are judged

for the intervals in use and for others that were tried. One process, one thread, no Ray.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from common import Images, checkpoints, data_options, embed, last_layer, load, mean_gradient, train
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, eye, hstack

from raypipe.assessment.conformal import Conformal
from raypipe.assessment.fidelity import HeldOutPredictions, hold_out, split
from raypipe.assessment.intervals import Calibration, Intervals, _fit_scale
from raypipe.assessment.rank_agreement import spearman
from raypipe.config import ExtrapolateSettings, ProxySettings
from raypipe.extrapolators.blend import AnchorGnn
from raypipe.runs.ledger import fingerprint
from raypipe.scores.calibration import recalibrate
from raypipe.scores.forward_mode import Aligner
from raypipe.scores.moso import combine, leave_one_out
from raypipe.scores.per_sample import norms_and_alignments
from raypipe.vision import training

EXTREME, MIN_JUDGED = 200, 300
DRAWS = 20
Method = Callable[[Calibration, Calibration, float], Callable[[Calibration], np.ndarray]]
"""From held-out seed samples, audit samples and a confidence to half-widths."""


class Scorer:
    """MoSo of any samples, by the proxy trained on the seed set."""

    def __init__(
        self, settings: ProxySettings, images: Images, seed: np.ndarray, folder: str
    ) -> None:
        self._settings, self._images, self._own = settings, images, images.take(seed)
        self._count = len(seed)
        self._rates, self._aligners, squares, aligned = [], [], [], []
        for _, rate, model in checkpoints(settings, images.classes, folder):
            recalibrate(model, (pixels for pixels, _ in self._own.batches(256)))
            direction = mean_gradient(model, self._own)
            pairs = [
                norms_and_alignments(model, pixels, label, direction)
                for pixels, label in self._own.batches()
            ]
            squares.append(np.concatenate([each[0].numpy() for each in pairs]))
            aligned.append(np.concatenate([each[1].numpy() for each in pairs]))
            self._rates.append(rate)
            self._aligners.append(Aligner(model, direction))
        self._seed_aligned = np.stack(aligned, -1).astype(np.float64)
        own = leave_one_out(self._seed_aligned, np.stack(squares, -1), self._count)
        self.seed_score = self._combined(own)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Scores of samples outside the seed set, float64 [n]."""
        part = self._images.take(rows)
        aligned = [
            np.concatenate([aligner(pixels, label).numpy() for pixels, label in part.batches()])
            for aligner in self._aligners
        ]
        return self._combined(np.stack(aligned, -1).astype(np.float64))

    def _combined(self, aligned: np.ndarray) -> np.ndarray:
        per_epoch = training.steps_per_epoch(self._count, self._settings.batch_size)
        spread = self._seed_aligned.std(0)
        steps = per_epoch * self._settings.epochs
        return combine(
            aligned, np.array(self._rates), "lr", steps=steps, samples=self._count, spread=spread
        ).astype(np.float64)


def extremeness(data: Calibration) -> np.ndarray:
    return np.abs(data.predicted - np.median(data.predicted))


# -- ways to calibrate -----------------------------------------------------------------------------


def in_use(held_out: Calibration, audit: Calibration, confidence: float):
    intervals = Intervals.fit(held_out, confidence, audit)
    return lambda data: intervals.around(data.predicted, data.doubt, data.label)


def seed_only(held_out: Calibration, audit: Calibration, confidence: float):
    intervals = Intervals.fit(held_out, confidence)
    return lambda data: intervals.around(data.predicted, data.doubt, data.label)


def by_distance(held_out: Calibration, audit: Calibration, confidence: float):
    """Version 0.2.0."""
    intervals = Conformal.fit(held_out.residual, held_out.doubt[:, 0], confidence, held_out.label)
    intervals = intervals.stretched(audit.residual, audit.doubt[:, 0], audit.label)
    return lambda data: intervals.half_width(data.doubt[:, 0], data.label)


def _quantile(values: np.ndarray, confidence: float) -> float:
    rank = int(np.ceil((len(values) + 1) * confidence - 1e-9))
    return float(np.sort(values)[min(rank, len(values)) - 1])


def mondrian(held_out: Calibration, audit: Calibration, confidence: float):
    """Constant width in four bins: extreme or not, far or not; stretched to the audit set."""
    everything = Calibration.concat([held_out, audit])
    middle = float(np.median(everything.predicted))
    starts = (
        np.quantile(np.abs(everything.predicted - middle), 0.85),
        np.quantile(everything.doubt[:, 0], 0.85),
    )

    def bins(data: Calibration) -> np.ndarray:
        extreme = np.abs(data.predicted - middle) > starts[0]
        return 2 * extreme + (data.doubt[:, 0] > starts[1])

    own = bins(everything)
    size = np.abs(everything.residual)
    width = np.array(
        [_quantile(size[own == b] if (own == b).any() else size, confidence) for b in range(4)]
    )
    factor = _quantile(np.abs(audit.residual) / width[bins(audit)], confidence)
    return lambda data: factor * width[bins(data)]


def _columns(data: Calibration, middle: float) -> np.ndarray:
    return np.column_stack(
        [np.ones(len(data)), data.doubt, np.abs(data.predicted - middle)]
    ).astype(np.float64)


def fitted_sigma(held_out: Calibration, audit: Calibration, confidence: float):
    """sigma of the intervals in use, without corrections."""
    everything = Calibration.concat([held_out, audit])
    middle = float(np.median(everything.predicted))
    weight = np.r_[np.ones(len(held_out)), np.full(len(audit), len(held_out) / len(audit))]
    scale = _fit_scale(_columns(everything, middle), np.abs(everything.residual), weight)
    ratio = np.abs(audit.residual) / (_columns(audit, middle) @ scale)
    return lambda data: _quantile(ratio, confidence) * (_columns(data, middle) @ scale)


def quantile_regression(held_out: Calibration, audit: Calibration, confidence: float):
    """Conformalised linear quantile regression of |residual| with non-negative coefficients."""
    everything = Calibration.concat([held_out, audit])
    middle = float(np.median(everything.predicted))
    weight = np.r_[np.ones(len(held_out)), np.full(len(audit), len(held_out) / len(audit))]
    columns, n = _columns(everything, middle), len(everything)
    unit = np.maximum(columns.mean(0), 1e-9)
    cost = np.r_[np.zeros(columns.shape[1]), weight * confidence, weight * (1 - confidence)]
    system = hstack([csr_matrix(columns / unit), eye(n), -eye(n)]).tocsr()
    found = linprog(
        cost, A_eq=system, b_eq=np.abs(everything.residual), bounds=(0, None), method="highs"
    )
    scale = found.x[: columns.shape[1]] / unit
    scale[0] += 1e-3 * np.abs(everything.residual).mean()
    ratio = np.abs(audit.residual) / (_columns(audit, middle) @ scale)
    return lambda data: _quantile(ratio, confidence) * (_columns(data, middle) @ scale)


METHODS: dict[str, Method] = {
    "in use: sigma of all doubts, corrected in zones": in_use,
    "the same from the seed set alone": seed_only,
    "sigma alone": fitted_sigma,
    "distance alone (0.2.0)": by_distance,
    "Mondrian bins": mondrian,
    "quantile regression": quantile_regression,
}


# -- tables ----------------------------------------------------------------------------------------


def print_coverage(held_out: Calibration, others: Calibration, audits: int) -> None:
    print(
        f"\nCoverage; audit set of {audits}, {len(others) - audits} samples judged, {DRAWS} draws"
    )
    head = "| intervals | at | overall | extreme tenth | farthest tenth | mean width |"
    print(f"\n{head}\n|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        for confidence in (0.9, 0.95):
            rows = []
            rng = np.random.default_rng(0)
            for _ in range(DRAWS):
                order = rng.permutation(len(others))
                audit, judged = others.take(order[:audits]), others.take(order[audits:])
                width = np.asarray(method(held_out, audit, confidence)(judged), np.float64)
                inside = np.abs(judged.residual) <= width
                tenth = len(judged) // 10
                extreme = np.argsort(-extremeness(judged))[:tenth]
                far = np.argsort(-judged.doubt[:, 0])[:tenth]
                rows.append(
                    (inside.mean(), inside[extreme].mean(), inside[far].mean(), 2 * width.mean())
                )
            mean, spread = np.mean(rows, 0), np.std(rows, 0)
            cells = [f"{100 * mean[k]:.1f} ± {100 * spread[k]:.1f}" for k in range(3)]
            print(f"| {name} | {100 * confidence:.0f} % | {' | '.join(cells)} | {mean[3]:.3g} |")


def print_error(name: str, predicted: np.ndarray, measured: np.ndarray) -> None:
    pearson = np.corrcoef(predicted, measured)[0, 1]
    rmse = np.sqrt(np.square(predicted - measured).mean())
    print(
        f"| {name} | {len(measured)} | {pearson:.3f} | {spearman(predicted, measured):.3f} | "
        f"{rmse:.3g} | {measured.std():.3g} | {predicted.min():.3g} to {predicted.max():.3g} | "
        f"{measured.min():.3g} to {measured.max():.3g} |"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data_options(parser)
    add = parser.add_argument
    add(
        "--share",
        type=float,
        help="of the samples in the seed set; default: 0.3 of the digits, 0.2",
    )
    add("--epochs", type=int, default=20)
    add("--checkpoints", type=int, default=5)
    add("--judged", type=int, default=600, help="samples measured to judge, beside the audit set")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    images, _ = load(arguments, 10_000)
    digits = arguments.dir is None
    share = arguments.share or (0.3 if digits else 0.2)
    settings = ProxySettings.model_validate(
        {
            "model": "small",
            "image_size": arguments.image_size,
            "epochs": arguments.epochs,
            "checkpoints": arguments.checkpoints,
            "batch_size": 64,
            **({"flip": False, "crop_padding": 1} if digits else {}),
        }
    )
    rng = np.random.default_rng([0, 1])
    order = rng.permutation(len(images))
    seed = np.sort(order[: round(share * len(images))])
    others = order[len(seed) :]
    what = fingerprint(settings.model_dump(mode="json"), arguments.dir, len(images), share)
    folder = os.path.join(arguments.cache, f"coverage-{what}")
    train(settings, images.take(seed), folder)
    *_, (_, _, model) = checkpoints(settings, images.classes, folder)
    nodes = embed(model, images)
    print(f"{len(images):,} samples of {images.classes} classes, {len(seed):,} in the seed set")
    accuracy = (nodes.signals[others, 1] > 0).mean()
    print(f"accuracy of the proxy outside the seed set: {100 * accuracy:.1f} %")
    scorer = Scorer(settings, images, seed, folder)
    score = scorer.seed_score
    seed_nodes = nodes.take(seed)

    def make() -> AnchorGnn:
        extrapolator = AnchorGnn(ExtrapolateSettings(), images.classes)
        extrapolator.head = last_layer(settings, folder)
        extrapolator.members = 1
        return extrapolator

    fitted = make()
    fitted.fit(seed_nodes, score)
    folds = ExtrapolateSettings().folds_of(len(seed), images.classes)
    held_out = HeldOutPredictions.concat(
        [
            hold_out(make, seed_nodes, score, part, mlp=False)
            for part in split(len(seed), 0.2, folds, 0)
        ]
    ).calibration()
    predicted, doubt = fitted.predict_with_doubt(nodes.take(others))
    audits = min(500, max(50, round(0.1 * len(seed))))
    drawn = np.arange(min(len(others), audits + max(MIN_JUDGED, arguments.judged)))
    measured = scorer(others[drawn])
    extreme = np.argsort(-np.abs(predicted - np.median(predicted)))[:EXTREME]
    measured_extreme = scorer(others[extreme])
    print("\n| samples | n | Pearson | Spearman | RMSE | spread | predicted | measured |")
    print("|---|---|---|---|---|---|---|---|")
    print_error("at random", predicted[drawn].astype(np.float64), measured)
    print_error("most extreme", predicted[extreme].astype(np.float64), measured_extreme)
    print(f"\nMeasured scores of the seed set: {score.min():.3g} to {score.max():.3g}")
    print_coverage(
        held_out,
        Calibration(
            measured - predicted[drawn], predicted[drawn], doubt[drawn], nodes.label[others[drawn]]
        ),
        audits,
    )
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
