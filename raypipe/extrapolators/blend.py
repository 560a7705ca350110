"""The default extrapolator: graph attention over scored neighbours, blended with other experts.

Four experts that fail differently: kernel regression over all scored samples (`kernel`) is smooth, needs few of them, and knows
which classes are alike; graph networks (`attention`) learn how neighbours' scores, classes and distances combine; boosted trees
(`trees`) find steps and interactions in the same and in the proxy's signals; the best signal itself (`proxy`) is all there is to
know of some difficulty scores. The blend is

    score(x) = sum_e w_e * expert_e(x) ,   w_e >= 0 ,   sum_e w_e = 1

(stacked regression: Wolpert 1992; Breiman 1996, "Stacked Regressions"). Networks, trees and signal are ensembles; each of their
members leaves out another tenth of the seed set. The weights minimise the squared error of the blend on these samples, where the
kernel's prediction is its leave-one-out one; ten more rows' worth of error holds them at the kernel where samples are too few to tell.
A sample's own score is never among the inputs of its prediction during the fit: it is not its own neighbour, and enters only
through mean and spread of all scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from raypipe.config.extrapolate import gnn_epochs
from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.extrapolators.features import Scaler, Target
from raypipe.extrapolators.gat import AnchorNet, Anchors, Queries, apply, encode, train
from raypipe.extrapolators.gp.regression import KernelRegression
from raypipe.extrapolators.proxy_signal import ProxyStatisticsMap
from raypipe.extrapolators.transfer import Transfer
from raypipe.extrapolators.tree_arrays import Forest
from raypipe.extrapolators.trees import FEATURES, NeighbourStatistics, grow
from raypipe.progress import ProgressCallback

EXPERTS = ("kernel", "networks", "trees", "signal")
NEIGHBOUR_EXPERTS = EXPERTS[:3]
"""Those that look at scored samples; with the signals themselves they are what a rehearsal learns to weigh."""
MEMBERS = 3
FOLDS = 10
PRIOR_ROWS, LEAST_WEIGHT = 10.0, 0.03
SMALLEST_BATCH, LARGEST_BATCH = 8, 64


class AnchorGnn(Extrapolator):
    """Graph attention over scored neighbours that carry their scores, kernel regression, boosted trees and the proxy's signals."""

    name = "gnn"
    default_neighbours = 32
    fewest = 20
    members = MEMBERS
    """Networks, ensembles of trees and signals of the fit, each without another tenth; with fewer it is quicker, and hardly worse."""
    head: tuple[np.ndarray, np.ndarray] | None = None
    """Weight float [c, d] and bias float [c] of the proxy's last layer, for the fit, where there is a proxy; see `kernel`."""
    transfer: Transfer | None = None
    """Learned in a rehearsal, in place of the weights: see `raypipe.assessment.rehearsal`."""

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Learn from the seed set and its measured scores, float [n].

        Raises RaypipeError for fewer than 20 samples, scores or embeddings that are not finite, labels out of range.
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
        if not self._target.spread:
            if progress is not None:
                progress(1, 1)
            return  # every measured score is the same, and so is every prediction
        count, rng = len(seed), np.random.default_rng(self.settings.seed)
        if self.settings.epochs == "auto":
            self.epochs = gnn_epochs(count)
        done, total = 0, 1 + self.members * self.epochs + self.members

        def tick() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        self._kernel = KernelRegression()
        u, v = self._scaler.embedding(seed), self._scaler.signals(seed)
        head = self._scaler.layer(*self.head) if self.head is not None else None
        smooth = self._kernel.fit(u, v, seed.label, z, rng, head)
        tick()
        own = np.arange(count)
        distance, near = self._scored.search(seed.embedding, self.neighbours, own)
        queries = self._as_queries(u, v, seed.label, distance, near)
        order = rng.permutation(count)
        held = [order[member::FOLDS] for member in range(self.members)]
        batch = int(np.clip(count // 16, SMALLEST_BATCH, LARGEST_BATCH))
        for left in held:
            rows = order[np.isin(order, left, invert=True)]
            part, number = torch.from_numpy(rows), int(rng.integers(2**31))
            self._networks.append(
                train(
                    queries, self._anchors, part, self.num_classes, self.epochs, batch, number, tick
                )
            )
            self._signals.append(ProxyStatisticsMap.fit(seed.signals[rows], z[rows]))
        x = self._statistics(seed, distance, near, own)
        self._forests = grow(x, z, held, self.settings.seed, lambda *_: tick())
        guesses = []
        for left, net, forest, signal in zip(held, self._networks, self._forests, self._signals):
            network = (
                apply(net, queries.take(torch.from_numpy(left)), self._anchors).double().numpy()
            )
            guesses.append(
                np.stack(
                    [smooth[left], network, forest.predict(x[left]), signal(seed.signals[left])], 1
                )
            )
        self._weights = dict(
            zip(EXPERTS, blend(np.concatenate(guesses), z[np.concatenate(held)]).tolist())
        )

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        looks = self._kernel is not None and (
            self.transfer is not None or self._weights["networks"] or self._weights["trees"]
        )
        return self._predict(nodes, self._nearest(nodes) if looks else None)

    def predict_with_difficulty(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        self._check_nodes(nodes)
        found = self._nearest(nodes)
        return self._predict(nodes, found), self._remoteness(found[0])

    def expert_predictions(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        """What kernel, networks and trees say in standard units, and the signals: float64 [n, 3 + s]; `difficulty`, float32 [n]."""
        self._check_nodes(nodes)
        found = self._nearest(nodes)
        return self._opinions(nodes, found), self._remoteness(found[0])

    def _predict(self, nodes: Nodes, found: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
        """`predict`, given the neighbours, which the kernel and the signal do without."""
        if self._kernel is None or not len(nodes):
            return np.full(len(nodes), self._target.mean, np.float32)
        if self.transfer is not None and found is not None:
            return self.transfer(self._opinions(nodes, found)).astype(np.float32)
        z = np.zeros(len(nodes))
        for expert, weight in self._weights.items():
            if weight and (expert == "signal" or expert == "kernel" or found is not None):
                z += weight * self._opinion(expert, nodes, found)
        return self._target.restore(z)

    def _opinions(self, nodes: Nodes, found: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        said = [
            np.zeros(len(nodes)) if self._kernel is None else self._opinion(expert, nodes, found)
            for expert in NEIGHBOUR_EXPERTS
        ]
        return np.column_stack([*said, nodes.signals])

    def _opinion(
        self, expert: str, nodes: Nodes, found: tuple[np.ndarray, np.ndarray] | None
    ) -> np.ndarray:
        """What one of the experts predicts, in standard units: float64 [n]."""
        assert self._kernel is not None
        if expert == "signal":
            return np.mean([signal(nodes.signals) for signal in self._signals], 0)
        u, v = self._scaler.embedding(nodes), self._scaler.signals(nodes)
        if expert == "kernel":
            return self._kernel.predict(u, v, nodes.label)
        assert found is not None
        if expert == "trees":
            x = self._statistics(nodes, *found)
            return np.mean([forest.predict(x) for forest in self._forests], 0)
        self._encoded = self._encoded or [encode(net, self._anchors) for net in self._networks]
        queries, nets = (
            self._as_queries(u, v, nodes.label, *found),
            zip(self._networks, self._encoded),
        )
        return (
            torch.stack([apply(net, queries, self._anchors, known) for net, known in nets])
            .mean(0)
            .double()
            .numpy()
        )

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {
            "label": self._seed.label,
            "signals": self._seed.signals,
            "score": self._anchors.score.numpy(),
        }
        tensors |= {f"scaler.{name}": value for name, value in self._scaler.tensors().items()}
        if self._kernel is not None:
            tensors |= {f"kernel.{name}": value for name, value in self._kernel.tensors().items()}
        for number, net in enumerate(self._networks):
            tensors |= {
                f"network{number}.{name}": value.numpy() for name, value in net.state_dict().items()
            }
        for number, (forest, signal) in enumerate(zip(self._forests, self._signals)):
            tensors |= {f"forest{number}.{name}": value for name, value in forest.tensors().items()}
            tensors |= {f"signal{number}.{name}": value for name, value in signal.tensors().items()}
        meta |= {
            "mean": self._target.mean,
            "spread": self._target.spread,
            "weights": self._weights,
            "epochs": self.epochs,
        }
        return tensors, meta | {"members": len(self._networks)}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta, classes=True)
        try:
            self._target = Target(float(meta["mean"]), float(meta["spread"]))
            self._weights = {expert: float(meta["weights"][expert]) for expert in EXPERTS}
            self.epochs = int(meta["epochs"])
            self._scaler = Scaler.from_tensors(_below(tensors, "scaler."))
            self._seed = Nodes(self._scored.vectors, tensors["label"], tensors["signals"])
            self._anchors = self._as_anchors(self._seed, tensors["score"])
            self._statistics = self._neighbour_statistics()
            self._kernel = None
            if self._target.spread:
                u, v = self._scaler.embedding(self._seed), self._scaler.signals(self._seed)
                self._kernel = KernelRegression.from_tensors(
                    _below(tensors, "kernel."), u, v, self._seed.label
                )
            self._networks, self._encoded = [], []
            members, width = range(int(meta["members"])), FEATURES + self._seed.signals.shape[1]
            self._forests = [
                Forest.from_tensors(tensors, f"forest{number}.", width) for number in members
            ]
            self._signals = [
                ProxyStatisticsMap.from_tensors(tensors, f"signal{number}.") for number in members
            ]
            for number in members:
                with torch.random.fork_rng(devices=[]):
                    net = AnchorNet(self._anchors.feature.shape[1], self.num_classes)
                net.load_state_dict(
                    {
                        name: torch.from_numpy(value)
                        for name, value in _below(tensors, f"network{number}.").items()
                    }
                )
                self._networks.append(net.eval())
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again"
            ) from None

    def _as_anchors(self, seed: Nodes, z: np.ndarray) -> Anchors:
        feature = torch.from_numpy(
            np.concatenate([self._scaler.embedding(seed), self._scaler.signals(seed)], 1)
        )
        return Anchors(
            feature, torch.from_numpy(seed.label + 1), torch.from_numpy(z.astype(np.float32))
        )

    def _neighbour_statistics(self) -> NeighbourStatistics:
        score = self._anchors.score.double().numpy()
        return NeighbourStatistics(self._of_class, self._seed.label, score, self._typical)

    def _as_queries(
        self,
        u: np.ndarray,
        v: np.ndarray,
        label: np.ndarray,
        distance: np.ndarray,
        near: np.ndarray,
    ) -> Queries:
        away = torch.from_numpy(distance / np.float32(self._typical))
        return Queries(
            torch.from_numpy(np.concatenate([u, v], 1)),
            torch.from_numpy(label + 1),
            torch.from_numpy(near),
            away,
        )


def blend(guesses: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Weights, float64 [e], none negative, with sum 1, of guesses float [n, e] that add up to z, float [n], best.

    Squared error, plus PRIOR_ROWS times the squared distance of the weights from the first guess alone. A weight below 0.03 becomes
    0: what hardly counts need not be computed for every sample of the source. So does that of guesses that are not finite (a
    training that diverged); at least one must be.
    """
    usable = np.isfinite(guesses).all(0)
    guesses, count = guesses[:, usable], int(usable.sum())
    prior, one = (
        np.sqrt(PRIOR_ROWS) * np.eye(count),
        1e3 * np.sqrt(len(z) + PRIOR_ROWS),
    )  # the sum, all but exactly
    found, _ = nnls(
        np.concatenate([guesses, prior, np.full((1, count), one)]),
        np.concatenate([z, prior[0], [one]]),
    )
    found[found < LEAST_WEIGHT * found.sum()] = 0
    weights = np.zeros(len(usable))
    weights[usable] = found / found.sum()
    return weights


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): np.array(value)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
