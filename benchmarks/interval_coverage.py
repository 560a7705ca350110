"""How often intervals hold, and how large errors are: overall, for extreme and for far samples.

    python benchmarks/interval_coverage.py [--dir DATA] [--parts 3] [--share 0.2] [--epochs 15]

A run with MoSo whose audit set is the whole source outside the seed set: every sample is predicted,
and every score is measured directly. Without --dir, the bundled digits. Then measured samples are
drawn many times, as many as in the seed set and in the audit set of a usual run (a tenth of it, 50
to 500 samples), and judged on all other samples. With --parts 1, one proxy instead of
cross-fitting, the seed set stays and only the audit set is drawn. Printed are

    the error     Pearson and RMSE of all samples, and as audit sets estimate them, alone and with
                  extreme predictions in addition; whether what such an audit, of 300 samples or
                  more, says about the 200 most extreme predictions agrees with their direct
                  measurement
    the coverage  of 90 and 95 % intervals: of all other samples, of the tenth of them with the most
                  extreme predictions, and of the tenth farthest from the seed set, for the
                  intervals in use and for others that were tried; and the root mean square of the
                  deviations within classes, of which a part is chance

Each figure is the mean, and the standard deviation, over the draws. The run is kept below --cache,
and is not repeated.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import split_conformal
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, eye, hstack

import raypipe
from raypipe import storage
from raypipe.assessment import intervals as rule
from raypipe.assessment.extremes import ExtremeZone
from raypipe.assessment.fidelity import compare
from raypipe.assessment.held_out import ExtremePredictions, HeldOutPredictions
from raypipe.assessment.intervals import Calibration, Intervals
from raypipe.runs.run import Run
from raypipe.stages.extrapolate.assess import fold_count
from raypipe.stages.extrapolate.fit_part import read_part_predictions
from raypipe.stages.extrapolate.predictions import PredictedSamples, read_predictions

MOST_EXTREME, MIN_JUDGED = 200, 300
DRAWS = 40
Widths = Callable[[Calibration], np.ndarray]
Method = Callable[[Calibration, Calibration | None, float], Widths]
"""From held-out samples, with one proxy also audit samples, and a confidence, to half-widths."""


# -- the run -------------------------------------------------------------------------------------


def finished_run(arguments: argparse.Namespace) -> Run:
    """The run, as far as predictions."""
    if arguments.dir is None:
        name, share = "digits", arguments.share or 0.3
        source = {"uri": "digits://", "format": "digits", "fragment_samples": 256}
        proxy: dict[str, Any] = {"image_size": 16, "flip": False, "crop_padding": 1, "epochs": 20}
    else:
        name, share = os.path.basename(os.path.normpath(arguments.dir)), arguments.share or 0.2
        source = {
            "uri": os.path.abspath(arguments.dir),
            "format": "parquet",
            "include": arguments.include,
        }
        proxy = {"image_size": 32, "epochs": 15, "checkpoints": 5}
    proxy |= {"epochs": arguments.epochs} if arguments.epochs else {}
    uri = os.path.join(arguments.cache, f"{name}-{arguments.parts}-{share:g}-{proxy['epochs']}")
    run = Run(uri)
    record = run.ledger().get("extrapolate") if storage.exists(run.ledger_file) else None
    if record is not None and record.state == "done":
        return run
    raypipe.run(
        {
            "run": uri,
            "source": source,
            "seed": {"fraction": share, "seed": 1, "audit": 1_000_000},
            "proxy": {
                "model": "small",
                "seed": 1,
                "batch_size": 32,
                "lr": 0.05,
                "parts": arguments.parts,
                **proxy,
            },
            "measure": {"scores": ["moso"]},
            "extrapolate": {"seed": 1, "judge_published": False, "audit_extremes": 0},
        },
        until="extrapolate",
    )
    return run


def predictions(run: Run) -> tuple[HeldOutPredictions, HeldOutPredictions]:
    """Held-out predictions for the seed set, and predictions for all other samples."""
    config = run.config()
    if config.proxy.cross_fits:
        seed, others = (read_part_predictions(config, run, which) for which in ("seed", "audit"))
        assert seed is not None and others is not None
    else:
        folds = range(fold_count(config, run))
        seed = PredictedSamples.concat([read_predictions(run, f"fold-{k}") for k in folds])
        others = read_predictions(run, "audit")
    return seed.predictions, others.predictions


def take(data: HeldOutPredictions, rows: np.ndarray) -> HeldOutPredictions:
    calibration = data.calibration().take(rows)
    return HeldOutPredictions(
        calibration.label,
        data.measured[rows],
        calibration.predicted,
        calibration.doubt[:, 0],
        {},
        data.n_fit,
        doubt=calibration.doubt,
    )


def extremeness(predicted: np.ndarray) -> np.ndarray:
    return np.abs(predicted - np.median(predicted))


# -- ways to calibrate -----------------------------------------------------------------------------


def in_use(held_out: Calibration, audit: Calibration | None, confidence: float) -> Widths:
    intervals = Intervals.fit(held_out, confidence, audit)
    return lambda data: intervals.around(data.predicted, data.doubt, data.label)


@contextmanager
def constants(**values: float) -> Iterator[None]:
    """Other constants of the intervals in use."""
    before = {name: getattr(rule, name) for name in values}
    try:
        for name, value in values.items():
            setattr(rule, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(rule, name, value)


def with_constants(**values: float) -> Method:
    def method(held_out: Calibration, audit: Calibration | None, confidence: float) -> Widths:
        with constants(**values):
            return in_use(held_out, audit, confidence)

    return method


def by_distance(held_out: Calibration, audit: Calibration | None, confidence: float) -> Widths:
    """Version 0.2.0."""
    intervals = split_conformal.fit(
        held_out.residual, held_out.doubt[:, 0], confidence, held_out.label
    )
    if audit is not None:
        intervals = split_conformal.stretched(
            intervals, audit.residual, audit.doubt[:, 0], audit.label
        )
    return lambda data: intervals.half_width(data.doubt[:, 0], data.label)


def _quantile(values: np.ndarray, confidence: float) -> float:
    rank = int(np.ceil((len(values) + 1) * confidence - 1e-9))
    return float(np.sort(values)[min(rank, len(values)) - 1])


def mondrian(held_out: Calibration, audit: Calibration | None, confidence: float) -> Widths:
    """Constant width in four bins: extreme or not, far or not; stretched to the audit set."""
    everything = Calibration.concat([held_out, audit] if audit is not None else [held_out])
    decisive = everything if audit is None else audit
    middle = float(np.median(everything.predicted))
    starts = (
        np.quantile(np.abs(everything.predicted - middle), 0.9),
        np.quantile(everything.doubt[:, 0], 0.9),
    )

    def bins(data: Calibration) -> np.ndarray:
        extreme = np.abs(data.predicted - middle) > starts[0]
        return 2 * extreme + (data.doubt[:, 0] > starts[1])

    own = bins(everything)
    size = np.abs(everything.residual)
    width = np.array(
        [_quantile(size[own == b] if (own == b).any() else size, confidence) for b in range(4)]
    )
    factor = _quantile(np.abs(decisive.residual) / width[bins(decisive)], confidence)
    return lambda data: factor * width[bins(data)]


def quantile_regression(
    held_out: Calibration, audit: Calibration | None, confidence: float
) -> Widths:
    """Conformalised linear quantile regression of |residual| with non-negative coefficients."""
    everything = Calibration.concat([held_out, audit] if audit is not None else [held_out])
    decisive = everything if audit is None else audit
    weight = np.ones(len(everything))
    if audit is not None:
        weight[len(held_out) :] = len(held_out) / len(audit)
    middle, n = float(np.median(everything.predicted)), len(everything)

    def columns_of(data: Calibration) -> np.ndarray:
        extreme = np.abs(data.predicted - middle)
        return np.column_stack([np.ones(len(data)), data.doubt, extreme]).astype(np.float64)

    columns = columns_of(everything)
    unit = np.maximum(columns.mean(0), 1e-9)
    cost = np.r_[np.zeros(columns.shape[1]), weight * confidence, weight * (1 - confidence)]
    system = hstack([csr_matrix(columns / unit), eye(n), -eye(n)]).tocsr()
    solved = linprog(
        cost, A_eq=system, b_eq=np.abs(everything.residual), bounds=(0, None), method="highs"
    )
    scale = solved.x[: columns.shape[1]] / unit
    scale[0] += 1e-3 * np.abs(everything.residual).mean()
    factor = _quantile(np.abs(decisive.residual) / (columns_of(decisive) @ scale), confidence)
    return lambda data: factor * (columns_of(data) @ scale)


NEVER = 1e12
METHODS: dict[str, Method] = {
    "in use": in_use,
    "without zones": with_constants(PRIOR_OF_ZONE=NEVER),
    "without classes": with_constants(PRIOR_OF_CLASS=NEVER),
    "zones of 15 %": with_constants(ZONE=0.15),
    "classes shrunk more": with_constants(PRIOR_OF_CLASS=60.0),
    "c and g not fitted in turns": with_constants(TURNS=1),
    "distance alone (0.2.0)": by_distance,
    "Mondrian bins": mondrian,
    "quantile regression": quantile_regression,
}


# -- tables ----------------------------------------------------------------------------------------


class Draws:
    """Measured samples as usual runs have them, drawn from those of one run.

    With cross-fitting, nothing was fitted to any sample, so that the seed set is drawn as well.
    """

    def __init__(self, seed: HeldOutPredictions, others: HeldOutPredictions, cross_fits: bool):
        self.seed, self.cross_fits = seed, cross_fits
        self.audits = min(500, max(50, round(0.1 * len(seed))))
        self.pool = HeldOutPredictions.concat([seed, others]) if cross_fits else others
        self.count = self.audits + (len(seed) if cross_fits else 0)

    def __iter__(self) -> Iterator[tuple[HeldOutPredictions, HeldOutPredictions]]:
        """Yield samples drawn at random, as fidelity takes them, and all others."""
        rng = np.random.default_rng(0)
        for _ in range(DRAWS):
            yield self.draw(rng, self.count)

    def draw(
        self, rng: np.random.Generator, count: int
    ) -> tuple[HeldOutPredictions, HeldOutPredictions]:
        order = rng.permutation(len(self.pool))
        return take(self.pool, order[:count]), take(self.pool, order[count:])

    def split(self, random: HeldOutPredictions) -> tuple[Calibration, Calibration | None]:
        """Held-out and audit samples for the calibration."""
        if self.cross_fits:
            return random.calibration(), None
        return self.seed.calibration(), random.calibration()


def shown(values: list[float], scale: float = 1, digits: int = 3) -> str:
    return f"{scale * np.mean(values):.{digits}f} ± {scale * np.std(values):.{digits}f}"


def print_coverage(draws: Draws) -> None:
    measured = f"{draws.count:,} measured samples" if draws.cross_fits else "audit sets"
    print(f"\nCoverage, %; {DRAWS} draws of {measured} (audit set: {draws.audits})")
    head = "intervals | at | overall | extreme tenth | farthest tenth | within classes | mean width"
    print(f"\n| {head} |\n|{'---|' * 7}")
    for name, method in METHODS.items():
        for confidence in (0.9, 0.95):
            rows = []
            for random, rest in draws:
                judged = rest.calibration()
                width = np.asarray(method(*draws.split(random), confidence)(judged), np.float64)
                inside = np.abs(judged.residual) <= width
                tenth = len(judged) // 10
                extreme = np.argsort(-extremeness(judged.predicted))[:tenth]
                far = np.argsort(-judged.doubt[:, 0])[:tenth]
                of_class = [inside[judged.label == y].mean() for y in np.unique(judged.label)]
                off = np.sqrt(np.square(np.array(of_class) - confidence).mean())
                shares = (inside.mean(), inside[extreme].mean(), inside[far].mean(), off)
                rows.append((*shares, 2 * width.mean()))
            overall, extremes, farthest, classes, width = map(list, zip(*rows, strict=True))
            cells = " | ".join(shown(values, 100, 1) for values in (overall, extremes, farthest))
            print(
                f"| {name} | {100 * confidence:.0f} | {cells} | {100 * np.mean(classes):.1f} | "
                f"{np.mean(width):.4f} |",
                flush=True,
            )


def figures(data: HeldOutPredictions, weight: np.ndarray | None = None) -> tuple[float, float]:
    """Pearson and RMSE, of weighted samples."""
    covariance = np.cov(data.predicted, data.measured, aweights=weight)
    pearson = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(pearson), float(np.sqrt(np.average(np.square(data.residual), weights=weight)))


def bootstrap(data: HeldOutPredictions, weight: np.ndarray) -> np.ndarray:
    """95 % intervals of Pearson and RMSE, float64 [2, 2]."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(0, len(data), len(data)) for _ in range(1000))
    resampled = [figures(take(data, rows), weight[rows]) for rows in draws]
    return np.quantile(resampled, (0.025, 0.975), axis=0).T


def audited(random: HeldOutPredictions, rest: HeldOutPredictions, count: int) -> ExtremePredictions:
    """Up to `count` extreme samples of the rest, which is in random order."""
    zone = ExtremeZone.of(random.predicted)
    drawn = np.flatnonzero(zone.contains(rest.predicted))[:count]
    return ExtremePredictions(take(rest, drawn), zone.count(rest.predicted))


def print_errors(draws: Draws) -> None:
    everything = draws.pool
    pearson, rmse = figures(everything)
    print(f"\nErrors as {DRAWS} audits estimate them")
    print("\n| samples | Pearson | RMSE |\n|---|---|---|")
    print(f"| all {len(everything):,}, measured | {pearson:.3f} | {rmse:.4f} |")
    alone, joined = [], []
    for random, rest in draws:
        # a random draw of the size of the audit set: the seed set would hide what extremes bring
        audit = take(random, np.arange(len(random))[-draws.audits :])
        extremes = audited(audit, rest, draws.audits)
        alone.append(compare(audit, 0, ()))
        joined.append(compare(audit, 0, (), extremes=extremes))
    for name, found in (
        (f"{draws.audits} at random", alone),
        (f"{draws.audits} at random, {draws.audits} extreme, weighted", joined),
    ):
        values = [[getattr(each, key) for each in found] for key in ("pearson", "rmse")]
        print(f"| {name} | {shown(values[0])} | {shown(values[1], digits=4)} |")


def print_agreement(draws: Draws) -> None:
    random, rest = draws.draw(np.random.default_rng(1), max(MIN_JUDGED, draws.audits))
    extremes = audited(random, rest, draws.audits)
    audit = HeldOutPredictions.concat([random, extremes.predictions])
    weight = extremes.zone.weights(random.predicted, len(extremes.predictions))
    distance = np.abs(draws.pool.predicted - extremes.zone.middle)
    order = np.argsort(-distance)[:MOST_EXTREME]
    most = take(draws.pool, order)
    same = np.flatnonzero(
        np.abs(audit.predicted - extremes.zone.middle) >= distance[order[-1]] - 1e-9
    )
    print("\nExtreme predictions: what an audit says, and a direct measurement")
    head = "samples | n | Pearson | RMSE | spread | predicted | measured"
    print(f"\n| {head} |\n|{'---|' * 7}")
    bounds = []
    for name, data, weights in (
        ("drawn at random", random, np.ones(len(random))),
        ("random and extreme, weighted", audit, weight),
        ("of these, as extreme as the next row", take(audit, same), weight[same]),
        ("the most extreme predictions, measured", most, np.ones(len(most))),
    ):
        found, (pearson, rmse) = figures(data, weights), bootstrap(data, weights)
        bounds.append((pearson, rmse))
        cells = [
            f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
            for value, (low, high), digits in zip(found, bounds[-1], (3, 4), strict=True)
        ]
        spread = np.sqrt(np.cov(data.measured, aweights=weights))
        print(
            f"| {name} | {len(data)} | {' | '.join(cells)} | {spread:.3g} | "
            f"{data.predicted.min():.3g} to {data.predicted.max():.3g} | "
            f"{data.measured.min():.3g} to {data.measured.max():.3g} |"
        )
    for name, in_audit, direct in zip(("Pearson", "RMSE"), bounds[-2], bounds[-1], strict=True):
        overlap = in_audit[0] <= direct[1] and direct[0] <= in_audit[1]
        verdict = "overlap" if overlap else "do not overlap"
        print(f"\n{name} in the last two rows: the 95 % intervals {verdict}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dir", help="folder of Parquet files; default: the bundled digits")
    add("--include", default="train-0000[01]*", help="files of it: 10,000 images of CIFAR")
    add("--parts", type=int, default=3, help="proxies; 1: no cross-fitting")
    add("--share", type=float, help="of the samples in the seed set; default: digits 0.3, else 0.2")
    add("--epochs", type=int, help="of the proxies; default: digits 20, else 15")
    add("--cache", default="/tmp/raypipe-coverage")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    began = time.perf_counter()
    run = finished_run(arguments)
    seed, others = predictions(run)
    seconds = sum(record.cpu_seconds for record in run.ledger().values())
    kind = "cross-fitting, 3 proxies" if arguments.parts == 3 else f"{arguments.parts} proxies"
    kind = "one proxy" if arguments.parts == 1 else kind
    print(f"{platform.machine()}; {arguments.dir or 'digits'}; {kind}")
    print(
        f"{len(seed) + len(others):,} samples, {len(seed):,} in the seed set; run: {seconds:.0f} s"
    )
    draws = Draws(seed, others, run.config().proxy.cross_fits)
    print_errors(draws)
    print_agreement(draws)
    print_coverage(draws)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
