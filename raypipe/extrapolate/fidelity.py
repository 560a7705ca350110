"""How well extrapolated scores rank samples compared with measured ones, on samples the extrapolator never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raypipe.config import ExtrapolateSettings
from raypipe.errors import RaypipeError
from raypipe.extrapolate.base import Extrapolator, Nodes, Progress, TransductiveExtrapolator
from raypipe.extrapolate.mlp import Mlp
from raypipe.extrapolate.neighbours import NeighbourIndex
from raypipe.extrapolate.proxy import SignalMap

KEEP_FRACTIONS = (0.3, 0.5, 0.7)
FEWEST = 10
"""Held-out samples below which a correlation says nothing."""
RESAMPLES = 1000
"""Bootstrap resamples behind each interval."""
LEVEL = 0.95
MLP_EPOCHS = 20
"""Of the network among the baselines: it learns little after these."""
CHUNK_VALUES = 1 << 22
"""Most float64 values held at once while resampling (32 MiB an array)."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Fidelity:
    """Agreement of predicted with measured scores on held-out samples. None where it is undefined; `note` then says why.

    spearman, pearson                    rank and linear correlation
    spearman_interval, pearson_interval  95 % bootstrap intervals, (lower, upper)
    overlap                              for each keep fraction: share of the measured top that is also in the predicted top
    overlap_interval                     95 % bootstrap intervals of these
    baselines                            Spearman of simpler predictions: class_mean, knn_published, mlp, proxy, proxy_loss, random
    n_fit, n_held                        samples fitted on and held out
    held, measured, predicted            rows of the seed set held out, int64, and their scores, float64
    difficulty                           of the held-out samples, float32 (`Extrapolator.difficulty`)
    """

    spearman: float | None
    pearson: float | None
    spearman_interval: Interval | None
    pearson_interval: Interval | None
    overlap: dict[float, float]
    overlap_interval: dict[float, Interval]
    baselines: dict[str, float | None]
    n_fit: int
    n_held: int
    note: str
    held: np.ndarray = field(repr=False)
    measured: np.ndarray = field(repr=False)
    predicted: np.ndarray = field(repr=False)
    difficulty: np.ndarray = field(repr=False)

    @property
    def residual(self) -> np.ndarray:
        """Measured minus predicted, float64 [n_held]: what `Conformal.fit` calibrates on."""
        return self.measured - self.predicted

    def as_dict(self) -> dict[str, Any]:
        """All figures, without the arrays, as JSON."""
        return {
            "spearman": self.spearman,
            "spearman_interval": list(self.spearman_interval) if self.spearman_interval else None,
            "pearson": self.pearson,
            "pearson_interval": list(self.pearson_interval) if self.pearson_interval else None,
            "overlap": {f"{keep:g}": value for keep, value in self.overlap.items()},
            "overlap_interval": {f"{keep:g}": list(value) for keep, value in self.overlap_interval.items()},
            "baselines": dict(self.baselines),
            "n_fit": self.n_fit,
            "n_held": self.n_held,
            "note": self.note,
        }


def judge(
    make_extrapolator: Callable[[], Extrapolator],
    seed_nodes: Nodes,
    score: np.ndarray,
    holdout: float,
    seed: int,
    all_nodes: Nodes | None = None,
    scored_rows: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """Hold out a random share of the seed set, fit on the rest, compare predictions of the held-out part with its scores.

    seed_nodes, score       the seed set and its measured scores, float [m]
    holdout, seed           share held out, and the seed of the split and of the bootstrap
    all_nodes, scored_rows  transductive extrapolators only: all samples, and the rows of the seed set among them, int64 [m]

    The proxy was trained on all of the seed set, so this tells nothing of a shift between it and the other samples: figures
    from samples measured outside the seed set (`compare`) are the stricter ones. Raises RaypipeError where the fit does.
    """
    score = np.asarray(score, dtype=np.float64)
    count = len(seed_nodes)
    if score.shape != (count,):
        raise RaypipeError(f"{count} seed samples but scores of shape {list(score.shape)}")
    n_held = round(count * holdout)
    if count < 2 or n_held == count:
        raise RaypipeError(f"{count} measured samples cannot be split to judge fidelity; raise seed.fraction")
    order = np.random.default_rng(seed).permutation(count)
    held, kept = np.sort(order[:n_held]), np.sort(order[n_held:])
    model = make_extrapolator()
    if len(kept) < model.fewest <= count:  # enough for a fit, but not for a fit on part of them
        nothing = compare(
            np.empty(0), np.empty(0), seed, n_fit=len(kept), baselines=_baselines(seed_nodes, score, kept, held[:0])
        )
        note = f"{count} measured samples leave {len(kept)} to fit on, fewer than the {model.fewest} needed: raise seed.fraction"
        return replace(nothing, note=note)
    if isinstance(model, TransductiveExtrapolator):
        if all_nodes is None or scored_rows is None or len(scored_rows) != count:
            raise RaypipeError(f"{model.name}: judging it takes all samples and the row of every seed sample among them")
        rows = np.asarray(scored_rows)
        model.fit_graph(all_nodes, rows[kept], score[kept], progress)
        predicted = model.predict_rows(rows[held])
    else:
        model.fit(seed_nodes.take(kept), score[kept], progress)
        predicted = model.predict(seed_nodes.take(held))
    baselines = _baselines(seed_nodes, score, kept, held)
    difficulty = model.difficulty(seed_nodes.take(held))
    return compare(predicted, score[held], seed, n_fit=len(kept), held=held, difficulty=difficulty, baselines=baselines)


def compare(
    predicted: np.ndarray,
    measured: np.ndarray,
    seed: int,
    *,
    n_fit: int,
    held: np.ndarray | None = None,
    difficulty: np.ndarray | None = None,
    baselines: dict[str, float | None] | None = None,
) -> Fidelity:
    """Fidelity of predicted against measured scores, both float [n], of samples that were not fitted on.

    Raises RaypipeError when lengths differ or a value is not finite.
    """
    predicted, measured = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if predicted.ndim != 1 or predicted.shape != measured.shape:
        raise RaypipeError(f"{list(predicted.shape)} predicted scores do not match {list(measured.shape)} measured ones")
    bad = int((~np.isfinite(predicted) | ~np.isfinite(measured)).sum())
    if bad:
        raise RaypipeError(f"{bad} of {len(measured)} held-out samples have scores that are not finite")
    n, note = len(measured), ""
    pearson = spearman = None
    pearson_interval = spearman_interval = None
    overlap: dict[float, float] = {}
    overlap_interval: dict[float, Interval] = {}
    if n < FEWEST:
        note = f"only {n} held-out samples; at least {FEWEST} are needed: raise seed.fraction or extrapolate.holdout"
    elif not np.ptp(measured):
        note = "all held-out samples have the same measured score, so there is no order to predict"
    else:
        if not np.ptp(predicted):
            note = "all held-out samples got the same predicted score"
        once = np.ones((1, n))
        pair = _Pair(predicted, measured, seed)
        samples = _resample(pair, n, seed)
        pearson, pearson_interval = _finite(pair.pearson(once)[0]), _interval(samples["pearson"])
        spearman, spearman_interval = _finite(pair.spearman(once)[0]), _interval(samples["spearman"])
        for keep in KEEP_FRACTIONS:
            overlap[keep] = float(pair.overlap(once, keep)[0])
            between = _interval(samples[keep])
            overlap_interval[keep] = between if between is not None else (overlap[keep], overlap[keep])
    return Fidelity(
        spearman,
        pearson,
        spearman_interval,
        pearson_interval,
        overlap,
        overlap_interval,
        baselines if baselines is not None else {},
        n_fit,
        n,
        note,
        held if held is not None else np.arange(n),
        measured,
        predicted,
        difficulty if difficulty is not None else np.ones(n, np.float32),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation with ties at their mean rank; None when it is undefined (constant, or fewer than 2 values)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    return _finite(_Pair(a, b, 0).spearman(np.ones((1, len(a))))[0])


class _Pair:
    """Statistics of n pairs under weights: a resample is how often it drew each pair, integers [resamples, n]."""

    def __init__(self, a: np.ndarray, b: np.ndarray, seed: int) -> None:
        # each its own order of ties: one order for both would let equal values agree on the top by accident
        rng = np.random.default_rng(seed)
        self._a, self._b = _Ordered(a, rng.permutation(len(a))), _Ordered(b, rng.permutation(len(b)))

    def pearson(self, weight: np.ndarray) -> np.ndarray:
        return _correlation(self._a.value[None], self._b.value[None], weight)

    def spearman(self, weight: np.ndarray) -> np.ndarray:
        return _correlation(self._a.ranks(weight), self._b.ranks(weight), weight)

    def overlap(self, weight: np.ndarray, keep: float) -> np.ndarray:
        top = max(1, round(keep * float(weight[0].sum())))
        return np.minimum(self._a.top(weight, top), self._b.top(weight, top)).sum(1) / top


class _Ordered:
    """Values with their order, computed once for all resamples."""

    def __init__(self, value: np.ndarray, tie: np.ndarray) -> None:
        # centred and scaled, since scores of 1e-4 or 1e6 would lose digits in the sums below
        spread = float(value.std())
        self.value = (value - value.mean()) / spread if spread > 0 else np.zeros_like(value)
        self._order = np.lexsort((tie, value))
        self._back = self._order.argsort()
        ordered = value[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._group = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])

    def ranks(self, weight: np.ndarray) -> np.ndarray:
        """Mean ranks [resamples, n] within each resample."""
        size = np.add.reduceat(weight[:, self._order], self._starts, axis=1)
        rank = size.cumsum(1) - (size - 1) / 2
        return rank[:, self._group][:, self._back]

    def top(self, weight: np.ndarray, count: int) -> np.ndarray:
        """How many of each pair's draws are among the `count` highest, [resamples, n]."""
        falling = weight[:, self._order[::-1]]
        before = falling.cumsum(1) - falling
        return np.clip(count - before, 0, falling)[:, ::-1][:, self._back]


def _correlation(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    total = weight.sum(1, keepdims=True)
    a = a - (weight * a).sum(1, keepdims=True) / total
    b = b - (weight * b).sum(1, keepdims=True) / total
    between = (weight * a * b).sum(1)
    spread = np.sqrt((weight * a * a).sum(1) * (weight * b * b).sum(1))
    return np.divide(between, spread, out=np.full(len(weight), np.nan), where=spread > 1e-12)


def _resample(pair: _Pair, n: int, seed: int) -> dict[str | float, np.ndarray]:
    rng = np.random.default_rng(seed)
    parts: list[dict[str | float, np.ndarray]] = []
    step = max(1, CHUNK_VALUES // n)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        weight = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        part: dict[str | float, np.ndarray] = {"pearson": pair.pearson(weight), "spearman": pair.spearman(weight)}
        parts.append(part | {keep: pair.overlap(weight, keep) for keep in KEEP_FRACTIONS})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _interval(values: np.ndarray) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    lower, upper = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lower), float(upper)


def _finite(value: float) -> float | None:
    return float(np.clip(value, -1, 1)) if np.isfinite(value) else None


def _baselines(nodes: Nodes, score: np.ndarray, kept: np.ndarray, held: np.ndarray) -> dict[str, float | None]:
    """Spearman on the held-out samples of what needs no fit worth the name, and of a small network on embedding and class."""
    measured = score[held]
    if len(held) < FEWEST:
        return {"class_mean": None, "knn_published": None, "mlp": None, "proxy": None, "proxy_loss": None, "random": 0.0}
    label = nodes.label[kept] + 1  # -1, no label, is a group of its own
    groups = int(nodes.label.max(initial=-1)) + 2
    count, total = np.bincount(label, minlength=groups), np.bincount(label, score[kept], minlength=groups)
    mean = np.where(count > 0, total / np.maximum(count, 1), score[kept].mean())
    distance, row = NeighbourIndex(nodes.embedding[kept]).search(nodes.embedding[held], 20)
    weight = np.exp(-(distance - distance[:, :1]).astype(np.float64))
    near = (weight * score[kept][row]).sum(1) / weight.sum(1)
    loss = nodes.signals[held, 0] if nodes.signals.shape[1] else None
    mlp = Mlp(ExtrapolateSettings(method="mlp", epochs=MLP_EPOCHS), groups - 1)
    enough = len(kept) >= mlp.fewest
    if enough:
        mlp.fit(nodes.take(kept), score[kept])
    best = SignalMap.fit(nodes.signals[kept], score[kept])
    return {
        "class_mean": spearman(mean[nodes.label[held] + 1], measured),
        "knn_published": spearman(near, measured),
        "mlp": spearman(mlp.predict(nodes.take(held)), measured) if enough else None,
        "proxy": spearman(best(nodes.signals[held]), measured) if best.maps else None,
        "proxy_loss": spearman(loss, measured) if loss is not None else None,
        "random": 0.0,
    }
