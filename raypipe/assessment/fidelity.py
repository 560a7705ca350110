"""How well extrapolated scores rank samples compared with measured ones, on samples the extrapolator never saw.

Two kinds of such samples. The seed set, held out of the fit in parts, of which each is predicted by a fit on the rest: the
proxy was trained on them, so they tell nothing of a shift between the seed set and the other samples. And, for scores that can
be measured on any sample, an audit set outside the seed set, predicted by the fit on all of it: that figure is unbiased.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raypipe.assessment.rank_agreement import (
    MIN_SAMPLES,
    NO_AGREEMENT,
    RankAgreement,
    chance,
    rank_agreement,
)
from raypipe.config import ExtrapolateSettings
from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes, TransductiveExtrapolator
from raypipe.extrapolators.mlp import Mlp
from raypipe.extrapolators.neighbours import NeighbourIndex
from raypipe.extrapolators.proxy_signal import ProxyStatisticsMap
from raypipe.progress import ProgressCallback

KEEP_FRACTIONS = (0.3, 0.5, 0.7)
NEIGHBOURS = 20
"""Of the published kNN among the baselines."""
MLP_EPOCHS = 20
"""Of the network among the baselines: it learns little after these."""


@dataclass(frozen=True)
class HeldOutPredictions:
    """Of m samples that were not fitted on.

    label       int64 [m]
    measured    float64 [m], their measured scores;  predicted  float64 [m]
    difficulty  float32 [m], `Extrapolator.difficulty`
    baselines   what simpler methods predict, float64 [m] by name; one that cannot be had is absent
    n_fit       samples fitted on
    note        why there are none, where there are none
    """

    label: np.ndarray
    measured: np.ndarray
    predicted: np.ndarray
    difficulty: np.ndarray
    baselines: Mapping[str, np.ndarray]
    n_fit: int
    note: str = ""

    def __len__(self) -> int:
        return len(self.measured)

    @property
    def residual(self) -> np.ndarray:
        """Measured minus predicted, float64 [m]: what `Conformal.fit` calibrates on."""
        return self.measured - self.predicted

    @staticmethod
    def concat(parts: Sequence[HeldOutPredictions]) -> HeldOutPredictions:
        """All of them, with the baselines that all have. Raises RaypipeError when there are no parts."""
        if not parts:
            raise RaypipeError("no predictions to join")
        names = [
            name for name in parts[0].baselines if all(name in part.baselines for part in parts)
        ]
        return HeldOutPredictions(
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.measured for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            np.concatenate([part.difficulty for part in parts]),
            {name: np.concatenate([part.baselines[name] for part in parts]) for name in names},
            min(part.n_fit for part in parts),
            next((part.note for part in parts if part.note), ""),
        )


@dataclass(frozen=True)
class Fidelity(RankAgreement):
    """Figures of the predictions, and beside them

    baselines  figures of simpler predictions: class_mean, knn_published, proxy_loss, random, ...
    n_fit      samples fitted on;  n_held  samples judged on
    note       why a figure is None
    """

    baselines: dict[str, RankAgreement] = field(default_factory=dict)
    n_fit: int = 0
    n_held: int = 0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON."""
        baselines = {name: found.as_dict() for name, found in self.baselines.items()}
        return super().as_dict() | {
            "baselines": baselines,
            "n_fit": self.n_fit,
            "n_held": self.n_held,
            "note": self.note,
        }


def split(count: int, holdout: float, folds: int, seed: int) -> list[np.ndarray]:
    """Rows of `count` samples in disjoint random parts, each the share `holdout` of them: int64, sorted, `folds` of them.

    Raises RaypipeError where nothing would be left to fit on.
    """
    if count < 2 or round(count * holdout) >= count:
        raise RaypipeError(
            f"{count} measured samples cannot be split to judge fidelity; raise seed.fraction"
        )
    order = np.random.default_rng(seed).permutation(count)
    bounds = [min(count, round(count * holdout * part)) for part in range(folds + 1)]
    return [np.sort(order[start:stop]) for start, stop in itertools.pairwise(bounds)]


def hold_out(
    make_extrapolator: Callable[[], Extrapolator],
    seed_nodes: Nodes,
    score: np.ndarray,
    held: np.ndarray,
    all_nodes: Nodes | None = None,
    scored_rows: np.ndarray | None = None,
    progress: ProgressCallback | None = None,
    mlp: bool = True,
) -> HeldOutPredictions:
    """Fit on the seed set without the rows `held`, int64, and predict these.

    seed_nodes, score       the seed set and its measured scores, float [m]
    all_nodes, scored_rows  transductive extrapolators only: all samples, and the rows of the seed set among them, int64 [m]
    mlp                     whether it is among the baselines: see `simpler_predictions`
    Where the rest is too small to fit on, there are no predictions but a note. Raises RaypipeError where the fit does.
    """
    score = np.asarray(score, np.float64)
    count = len(seed_nodes)
    if score.shape != (count,):
        raise RaypipeError(f"{count} seed samples but scores of shape {list(score.shape)}")
    kept = np.setdiff1d(np.arange(count), held)
    model = make_extrapolator()
    known = seed_nodes.take(kept)
    if len(kept) < model.fewest <= count:  # enough for a fit, but not for a fit on part of them
        note = f"{count} measured samples leave {len(kept)} to fit on, fewer than the {model.fewest} needed: raise seed.fraction"
        none = np.empty(0)
        return HeldOutPredictions(
            np.empty(0, np.int64), none, none, np.empty(0, np.float32), {}, len(kept), note
        )
    if isinstance(model, TransductiveExtrapolator):
        if all_nodes is None or scored_rows is None or len(scored_rows) != count:
            raise RaypipeError(
                f"{model.name}: judging it takes all samples and the row of every seed sample among them"
            )
        rows = np.asarray(scored_rows)
        model.fit_graph(all_nodes, rows[kept], score[kept], progress)
        return predict(
            model, known, score[kept], seed_nodes.take(held), score[held], rows[held], mlp
        )
    model.fit(known, score[kept], progress)
    return predict(model, known, score[kept], seed_nodes.take(held), score[held], mlp=mlp)


def predict(
    model: Extrapolator,
    known: Nodes,
    score: np.ndarray,
    nodes: Nodes,
    measured: np.ndarray,
    rows: np.ndarray | None = None,
    mlp: bool = True,
) -> HeldOutPredictions:
    """What a fitted extrapolator and the baselines predict for `nodes`, beside their measured scores, float [m].

    known, score  the samples that it was fitted on and their scores, float [n]
    rows          transductive extrapolators only: the rows of `nodes` in the graph, int64 [m]
    mlp           whether it is among the baselines: see `simpler_predictions`
    """
    if isinstance(model, TransductiveExtrapolator):
        if rows is None:
            raise RaypipeError(
                f"{model.name}: predicting takes the rows of the samples in the graph"
            )
        predicted, difficulty = model.predict_rows(rows), model.difficulty(nodes)
    else:
        predicted, difficulty = model.predict_with_difficulty(nodes)
    baselines = simpler_predictions(known, np.asarray(score, np.float64), nodes, model, mlp)
    measured = np.asarray(measured, np.float64)
    return HeldOutPredictions(
        nodes.label, measured, predicted.astype(np.float64), difficulty, baselines, n_fit=len(known)
    )


def compare(
    found: HeldOutPredictions, seed: int, keep: Sequence[float] = KEEP_FRACTIONS
) -> Fidelity:
    """Fidelity of predictions of samples that were not fitted on; `seed` is that of the bootstrap.

    Raises RaypipeError when lengths differ or a value is not finite.
    """
    measured = np.asarray(found.measured, np.float64)
    rivals = {name: np.asarray(value, np.float64) for name, value in found.baselines.items()}
    for name, value in {"": np.asarray(found.predicted, np.float64), **rivals}.items():
        if value.ndim != 1 or value.shape != measured.shape:
            raise RaypipeError(
                f"{list(value.shape)} predicted scores {name} do not match {list(measured.shape)} measured ones"
            )
        bad = int((~np.isfinite(value) | ~np.isfinite(measured)).sum())
        if bad:
            raise RaypipeError(
                f"{bad} of {len(measured)} held-out samples have scores {name} that are not finite"
            )
    n, note = len(measured), found.note
    if n < MIN_SAMPLES:
        note = (
            note
            or f"only {n} held-out samples; at least {MIN_SAMPLES} are needed: raise seed.fraction or extrapolate.holdout"
        )
    elif not np.ptp(measured):
        note = "all held-out samples have the same measured score, so there is no order to predict"
    else:
        if not np.ptp(found.predicted):
            note = "all held-out samples got the same predicted score"
        # the empty name is the method's own; no baseline has it
        judged = rank_agreement({"": found.predicted, **rivals}, measured, seed, keep)
        own = judged.pop("")
        return Fidelity(
            **vars(own),
            baselines=judged | {"random": chance(n, keep)},
            n_fit=found.n_fit,
            n_held=n,
            note=note,
        )
    return Fidelity(
        **vars(NO_AGREEMENT),
        baselines=dict.fromkeys(rivals, NO_AGREEMENT),
        n_fit=found.n_fit,
        n_held=n,
        note=note,
    )


def simpler_predictions(
    known: Nodes,
    score: np.ndarray,
    nodes: Nodes,
    model: Extrapolator | None = None,
    mlp: bool = True,
) -> dict[str, np.ndarray]:
    """What needs no fit worth the name predicts for `nodes`, float64 [m] by name, from `known` samples with scores float64 [n].

    `model`, where it was fitted on `known`, lends its index.

    class_mean     mean score of the class; of all where the class has no scored sample
    knn_published  `raypipe.extrapolators.published.knn`
    mlp            `raypipe.extrapolators.mlp` after 20 epochs, where there are enough samples for it; without `mlp` it is left out: of all these it
                   takes nearly all the time
    proxy          the one of the proxy's signals that ranks the known samples best (`raypipe.extrapolators.proxy_signal`), where there are any
    proxy_loss     the proxy's loss, where the samples have signals
    """
    label = known.label + 1  # -1, no label, is a group of its own
    groups = int(max(known.label.max(initial=-1), nodes.label.max(initial=-1))) + 2
    count, total = np.bincount(label, minlength=groups), np.bincount(label, score, minlength=groups)
    mean = np.where(count > 0, total / np.maximum(count, 1), score.mean())
    index = model.index_of(known.embedding) if model else NeighbourIndex(known.embedding)
    distance, row = index.search(nodes.embedding, NEIGHBOURS)
    weight = np.exp(-(distance - distance[:, :1]).astype(np.float64))
    result = {
        "class_mean": mean[nodes.label + 1],
        "knn_published": (weight * score[row]).sum(1) / weight.sum(1),
    }
    # its neighbours are asked for nothing here, so an index of them need not be quick
    network = Mlp(
        ExtrapolateSettings(method="mlp", epochs=MLP_EPOCHS, exact_neighbours=len(known)),
        groups - 1,
    )
    if mlp and len(known) >= network.fewest:
        network.fit(known, score)
        result["mlp"] = network.predict(nodes).astype(np.float64)
    best = ProxyStatisticsMap.fit(known.signals, score)
    if best.maps:
        result["proxy"] = best(nodes.signals)
    if nodes.signals.shape[1]:
        result["proxy_loss"] = nodes.signals[:, 0].astype(np.float64)
    return result
