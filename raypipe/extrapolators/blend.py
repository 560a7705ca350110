"""Default extrapolator: graph attention over scored neighbours, blended with three other experts.

The four experts fail differently:

- kernel regression over all scored samples (`gp.regression`) is smooth, needs few samples and uses
  the similarity of classes;
- graph networks (`gat`) learn how the scores, classes and distances of neighbours combine;
- boosted trees (`trees`) find steps and interactions in these and in the proxy statistics;
- the best proxy statistic itself (`proxy_signal`) is all that can be known of some difficulty
  scores.

The blend is

    score(x) = sum_e w_e * expert_e(x) ,   w_e >= 0 ,   sum_e w_e = 1

Networks, trees and proxy statistic are ensembles; each member leaves out another tenth of the seed
set. The weights minimise the squared error of the blend on these held-out samples, where the kernel
contributes its leave-one-out predictions. A penalty worth ten rows of error pulls the weights
towards the kernel alone, so that it prevails where samples are too few to decide. No prediction
leaves the range of the measured scores, except as far as held-out samples justify
(`features.Bounds`). During the fit a
sample's own score is never among the inputs of its prediction: it is not its own neighbour, and
enters only through the mean and spread of all scores.

References
----------
Stacked regression: Wolpert 1992; Breiman 1996, "Stacked Regressions".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from raypipe.config.extrapolate import gnn_epochs
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.extrapolators.features import Bounds, Scaler, Target
from raypipe.extrapolators.gat import AnchorNet, Anchors, Queries, apply, encode, train
from raypipe.extrapolators.gp.regression import KernelRegression
from raypipe.extrapolators.neighbours import Neighbours
from raypipe.extrapolators.proxy_signal import ProxyStatisticsMap
from raypipe.extrapolators.transfer import Transfer
from raypipe.extrapolators.tree_arrays import Forest
from raypipe.extrapolators.trees import FEATURES, NeighbourStatistics, grow
from raypipe.progress import ProgressCallback

EXPERTS = ("kernel", "networks", "trees", "signal")
NEIGHBOUR_EXPERTS = EXPERTS[:3]
"""Experts that use scored samples. A rehearsal learns to weigh them and the proxy statistics."""
MEMBERS = 3
"""Members of each ensemble."""
FOLDS = 10
"""Each member leaves out another one of these parts of the seed set."""
PRIOR_ROWS = 10.0
"""Strength of the penalty that pulls the weights towards the kernel, in rows of data."""
MIN_WEIGHT = 0.03
"""Weights below this become 0."""
MIN_BATCH, MAX_BATCH = 8, 64


class AnchorGnn(Extrapolator):
    """Blend of graph attention, kernel regression, boosted trees and the best proxy statistic.

    Attributes
    ----------
    members
        Number of networks, tree ensembles and statistics in the fit, each without another tenth of
        the seed set. Fewer make the fit faster and hardly worse.
    head
        Weight float [c, d] and bias float [c] of the proxy's last layer, used by the fit if the
        proxy is known; see `gp.regression`.
    transfer
        Map learned in a rehearsal, used instead of the weights; see `raypipe.assessment.rehearsal`.
    """

    name = "gnn"
    default_neighbours = 32
    min_samples = 20
    members = MEMBERS
    head: tuple[np.ndarray, np.ndarray] | None = None
    transfer: Transfer | None = None

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Learn from the seed set and its measured scores, float [n].

        Raises
        ------
        RaypipeError
            There are fewer than 20 samples, scores or embeddings are not finite, or labels are out
            of range.
        """
        score = self._check_fit(seed, score)
        self._build_index(seed.embedding, seed.label)
        self._scaler = Scaler.fit(seed)
        self._target, z = Target.fit(score)
        self._seed, self._anchors = seed, self._as_anchors(seed, z)
        self._statistics = self._neighbour_statistics()
        self._networks: list[AnchorNet] = []
        self._encoded: list[Tensor] = []
        self._forests: list[Forest] = []
        self._signals: list[ProxyStatisticsMap] = []
        self._kernel: KernelRegression | None = None
        self._weights = dict.fromkeys(EXPERTS, 0.0)
        self._bounds = Bounds.fit(score)
        if self._target.spread:
            self._fit_experts(seed, z, progress)
        elif progress is not None:
            progress(1, 1)  # all scores are equal, and so are all predictions

    def _fit_experts(self, seed: Nodes, z: np.ndarray, progress: ProgressCallback | None) -> None:
        """Fit the experts to standardised scores, float [n], and weigh them."""
        count, rng = len(seed), np.random.default_rng(self.settings.seed)
        if self.settings.epochs == "auto":
            self.epochs = gnn_epochs(count)
        steps = _Steps(1 + self.members * self.epochs + self.members, progress)

        self._kernel = KernelRegression()
        u, v = self._scaler.embedding(seed), self._scaler.signals(seed)
        head = self._scaler.layer(*self.head) if self.head is not None else None
        left_out = self._kernel.fit(u, v, seed.label, z, rng, head)
        steps.advance()

        own = np.arange(count)
        nearest = self._scored.search(seed.embedding, self.neighbours, own)
        queries = self._as_queries(u, v, seed.label, nearest)
        order = rng.permutation(count)
        folds = [order[member::FOLDS] for member in range(self.members)]
        batch = int(np.clip(count // 16, MIN_BATCH, MAX_BATCH))
        for held in folds:
            rows = order[np.isin(order, held, invert=True)]
            net_seed = int(rng.integers(2**31))
            net = train(
                queries,
                self._anchors,
                torch.from_numpy(rows),
                self.num_classes,
                self.epochs,
                batch,
                net_seed,
                steps.advance,
            )
            self._networks.append(net)
            self._signals.append(ProxyStatisticsMap.fit(seed.signals[rows], z[rows]))
        x = self._statistics(seed, *nearest, own)
        self._forests = grow(x, z, folds, self.settings.seed, steps.advance)

        held_out = []
        for held, net, forest, signal in zip(folds, self._networks, self._forests, self._signals):
            network = apply(net, queries.take(torch.from_numpy(held)), self._anchors)
            columns = [
                left_out[held],
                network.double().numpy(),
                forest.predict(x[held]),
                signal(seed.signals[held]),
            ]
            held_out.append(np.stack(columns, 1))
        held, predictions = np.concatenate(folds), np.concatenate(held_out)
        weights = blend(predictions, z[held])
        self._weights = dict(zip(EXPERTS, weights.tolist()))
        # z without outliers: the range of scores that the experts were fitted to
        used = np.nan_to_num(predictions) @ weights
        target = self._target
        self._bounds = Bounds.fit(target.unscaled(z), held, target.unscaled(used))

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        needs_neighbours = self._kernel is not None and (
            self.transfer is not None or self._weights["networks"] or self._weights["trees"]
        )
        return self._predict(nodes, self._nearest(nodes) if needs_neighbours else None)

    def predict_with_difficulty(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        self._check_nodes(nodes)
        nearest = self._nearest(nodes)
        return self._predict(nodes, nearest), self._remoteness(nearest.distance)

    def doubt(self, nodes: Nodes) -> np.ndarray:
        return self.predict_with_doubt(nodes)[1]

    def predict_with_doubt(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        """Return predictions, float32 [n], and doubts, float32 [n, 4].

        The disagreement is the standard deviation of the predictions of kernel, proxy statistic and
        every other expert that is in use, in standard units.
        """
        self._check_nodes(nodes)
        nearest = self._nearest(nodes)
        difficulty = self._remoteness(nearest.distance)
        if self._kernel is None or not len(nodes):
            return self._predict(nodes, nearest), self._doubts(nodes, difficulty)
        used = [
            expert
            for expert in EXPERTS
            if self._weights[expert] or expert in ("kernel", "signal") or self.transfer is not None
        ]
        experts = {expert: self._expert_prediction(expert, nodes, nearest) for expert in used}
        error = self._kernel.error_length(self._scaler.embedding(nodes), nodes.label)
        disagreement = np.nan_to_num(np.std(list(experts.values()), axis=0))
        doubt = self._doubts(nodes, difficulty, error, disagreement)
        if self.transfer is not None:
            inputs = np.column_stack(
                [*(experts[name] for name in NEIGHBOUR_EXPERTS), nodes.signals]
            )
            return self.transfer(inputs).astype(np.float32), doubt
        return self._blended(len(nodes), experts), doubt

    def expert_predictions(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        """Return the predictions of the single experts, and the difficulty.

        Returns
        -------
        predictions
            Kernel, networks and trees in standard units, then the proxy statistics, float64
            [n, 3 + s].
        difficulty
            As `difficulty` returns it, float32 [n].
        """
        self._check_nodes(nodes)
        nearest = self._nearest(nodes)
        return self._transfer_inputs(nodes, nearest), self._remoteness(nearest.distance)

    def _predict(self, nodes: Nodes, nearest: Neighbours | None) -> np.ndarray:
        """Predict scores, float32 [n]; kernel and signal do without neighbours."""
        if self._kernel is None or not len(nodes):
            return np.full(len(nodes), self._target.mean, np.float32)
        if self.transfer is not None and nearest is not None:
            return self.transfer(self._transfer_inputs(nodes, nearest)).astype(np.float32)
        experts = {
            expert: self._expert_prediction(expert, nodes, nearest)
            for expert, weight in self._weights.items()
            if weight
        }
        return self._blended(len(nodes), experts)

    def _blended(self, count: int, experts: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the scores, float32 [n], that the weighted experts predict."""
        z = np.zeros(count)
        for expert, weight in self._weights.items():
            if weight:
                z += weight * experts[expert]
        return self._bounds(self._target.unscaled(z))

    def _transfer_inputs(self, nodes: Nodes, nearest: Neighbours) -> np.ndarray:
        """Return the inputs of `Transfer`, float64 [n, 3 + s]."""
        predictions = [
            np.zeros(len(nodes))
            if self._kernel is None
            else self._expert_prediction(expert, nodes, nearest)
            for expert in NEIGHBOUR_EXPERTS
        ]
        return np.column_stack([*predictions, nodes.signals])

    def _expert_prediction(
        self, expert: str, nodes: Nodes, nearest: Neighbours | None
    ) -> np.ndarray:
        """Return the prediction of one expert in standard units, float64 [n]."""
        if expert == "signal":
            return np.mean([signal(nodes.signals) for signal in self._signals], 0)
        if expert == "kernel":
            assert self._kernel is not None
            u, v = self._scaler.embedding(nodes), self._scaler.signals(nodes)
            return self._kernel.predict(u, v, nodes.label)
        assert nearest is not None
        if expert == "trees":
            x = self._statistics(nodes, *nearest)
            return np.mean([forest.predict(x) for forest in self._forests], 0)
        return self._network_prediction(nodes, nearest)

    def _network_prediction(self, nodes: Nodes, nearest: Neighbours) -> np.ndarray:
        """Return the mean prediction of the networks in standard units, float64 [n]."""
        if not self._encoded:
            self._encoded = [encode(net, self._anchors) for net in self._networks]
        u, v = self._scaler.embedding(nodes), self._scaler.signals(nodes)
        queries = self._as_queries(u, v, nodes.label, nearest)
        predictions = [
            apply(net, queries, self._anchors, encoded)
            for net, encoded in zip(self._networks, self._encoded)
        ]
        return torch.stack(predictions).mean(0).double().numpy()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {
            "label": self._seed.label,
            "signals": self._seed.signals,
            "score": self._anchors.score.numpy(),
        }
        tensors |= _prefixed("scaler.", self._scaler.tensors())
        if self._kernel is not None:
            tensors |= _prefixed("kernel.", self._kernel.tensors())
        for number, net in enumerate(self._networks):
            arrays = {name: value.numpy() for name, value in net.state_dict().items()}
            tensors |= _prefixed(f"network{number}.", arrays)
        for number, (forest, signal) in enumerate(zip(self._forests, self._signals)):
            tensors |= _prefixed(f"forest{number}.", forest.tensors())
            tensors |= _prefixed(f"signal{number}.", signal.tensors())
        meta |= {
            "mean": self._target.mean,
            "spread": self._target.spread,
            "weights": self._weights,
            "epochs": self.epochs,
            "bounds": self._bounds.state(),
        }
        return tensors, meta | {"members": len(self._networks)}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta, classes=True)
        try:
            self._target = Target(float(meta["mean"]), float(meta["spread"]))
            self._weights = {expert: float(meta["weights"][expert]) for expert in EXPERTS}
            self.epochs = int(meta["epochs"])
            self._bounds = Bounds.from_meta(meta)
            self._scaler = Scaler.from_tensors(_with_prefix(tensors, "scaler."))
            self._seed = Nodes(self._scored.vectors, tensors["label"], tensors["signals"])
            self._anchors = self._as_anchors(self._seed, tensors["score"])
            self._statistics = self._neighbour_statistics()
            self._kernel = None
            if self._target.spread:
                u, v = self._scaler.embedding(self._seed), self._scaler.signals(self._seed)
                kernel = _with_prefix(tensors, "kernel.")
                if "bounds" not in meta:  # of version 0.2.0 or older, which used errors as they are
                    kernel["error_scale"] = np.zeros(2)
                self._kernel = KernelRegression.from_tensors(kernel, u, v, self._seed.label)
            members, width = range(int(meta["members"])), FEATURES + self._seed.signals.shape[1]
            self._forests = [
                Forest.from_tensors(tensors, f"forest{number}.", width) for number in members
            ]
            self._signals = [
                ProxyStatisticsMap.from_tensors(tensors, f"signal{number}.") for number in members
            ]
            self._networks = [
                self._restored_network(_with_prefix(tensors, f"network{number}."))
                for number in members
            ]
            self._encoded = []
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise self._damaged(error) from None

    def _restored_network(self, weights: dict[str, np.ndarray]) -> AnchorNet:
        with torch.random.fork_rng(devices=[]):
            net = AnchorNet(self._anchors.feature.shape[1], self.num_classes)
        net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return net.eval()

    def _as_anchors(self, seed: Nodes, z: np.ndarray) -> Anchors:
        feature = np.concatenate([self._scaler.embedding(seed), self._scaler.signals(seed)], 1)
        return Anchors(
            torch.from_numpy(feature),
            torch.from_numpy(seed.label + 1),
            torch.from_numpy(z.astype(np.float32)),
        )

    def _neighbour_statistics(self) -> NeighbourStatistics:
        score = self._anchors.score.double().numpy()
        return NeighbourStatistics(self._of_class, self._seed.label, score, self._typical)

    def _as_queries(
        self, u: np.ndarray, v: np.ndarray, label: np.ndarray, nearest: Neighbours
    ) -> Queries:
        return Queries(
            torch.from_numpy(np.concatenate([u, v], 1)),
            torch.from_numpy(label + 1),
            torch.from_numpy(nearest.row),
            torch.from_numpy(nearest.distance / np.float32(self._typical)),
        )


class _Steps:
    """Counts the steps of a fit and reports them."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self, *_: int) -> None:
        """Count one step; arguments are ignored, so that this is a `ProgressCallback` too."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def blend(predictions: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the weights of the best convex combination of expert predictions.

    They minimise the squared error plus `PRIOR_ROWS` times the squared distance of the weights from
    the first expert alone. A weight below 0.03 becomes 0, so that an expert that hardly counts is
    not computed for every sample of the source. Experts whose predictions are not all finite (a
    training diverged) get the weight 0; at least one expert must be finite.

    Parameters
    ----------
    predictions
        Predictions of e experts, float [n, e].
    z
        Measured scores, float [n].

    Returns
    -------
    np.ndarray
        Weights, float64 [e], not negative, with sum 1.
    """
    usable = np.isfinite(predictions).all(0)
    predictions, count = predictions[:, usable], int(usable.sum())
    prior = np.sqrt(PRIOR_ROWS) * np.eye(count)
    sum_row = 1e3 * np.sqrt(len(z) + PRIOR_ROWS)  # heavy enough to make the sum 1 almost exactly
    solution, _ = nnls(
        np.concatenate([predictions, prior, np.full((1, count), sum_row)]),
        np.concatenate([z, prior[0], [sum_row]]),
    )
    solution[solution < MIN_WEIGHT * solution.sum()] = 0
    weights = np.zeros(len(usable))
    weights[usable] = solution / solution.sum()
    return weights


def _prefixed(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def _with_prefix(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return copies of the tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): np.array(value)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
