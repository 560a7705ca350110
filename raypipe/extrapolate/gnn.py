"""The default extrapolator: graph attention over scored neighbours, blended with kernel regression over all scored samples.

Two experts that fail differently: the network (`attention`) learns how neighbours' scores, classes and distances combine; the
kernel regression (`kernel`) is smooth, needs few samples, and knows which classes are alike. The blend is

    score(x) = (1 - b) * kernel(x) + b * mean_m network_m(x)

over an ensemble of networks. Each leaves out another tenth of the seed set; b in [0, 1] minimises the squared error of the blend
on these samples, where the kernel's prediction is its leave-one-out one. A sample's own score is never among the inputs of its
prediction during the fit: it is not its own neighbour, and enters only through mean and spread of all scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypipe.errors import RaypipeError
from raypipe.extrapolate.attention import AnchorNet, Anchors, Queries, apply, train
from raypipe.extrapolate.base import Extrapolator, Nodes, Progress
from raypipe.extrapolate.features import Scaler, Target
from raypipe.extrapolate.kernel import KernelRegression

MEMBERS = 3
FOLDS = 10
BUDGET = 60_000
"""Samples a network sees in a fit with `epochs: auto`, within the bounds below: few seed samples take more epochs."""
FEWEST_EPOCHS, MOST_EPOCHS = 8, 40
SMALLEST_BATCH, LARGEST_BATCH = 8, 64


class AnchorGnn(Extrapolator):
    """Graph attention over scored neighbours that carry their scores, and kernel regression."""

    name = "gnn"
    default_neighbours = 32
    fewest = 20

    def fit(self, seed: Nodes, score: np.ndarray, progress: Progress | None = None) -> None:
        """Learn from the seed set and its measured scores, float [n].

        Raises RaypipeError for fewer than 20 samples, scores or embeddings that are not finite, labels out of range.
        """
        score = self._check_fit(seed, score)
        self._build_index(seed.embedding)
        self._scaler = Scaler.fit(seed)
        self._target, z = Target.fit(score)
        self._seed, self._anchors = seed, self._as_anchors(seed, z)
        self._networks: list[AnchorNet] = []
        self._kernel: KernelRegression | None = None
        self._blend = 0.0
        if not self._target.spread:
            if progress is not None:
                progress(1, 1)
            return  # every measured score is the same, and so is every prediction
        count, rng = len(seed), np.random.default_rng(self.settings.seed)
        if self.settings.epochs == "auto":
            self.epochs = int(np.clip(BUDGET // count, FEWEST_EPOCHS, MOST_EPOCHS))
        done, total = 0, 1 + MEMBERS * self.epochs

        def tick() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        self._kernel = KernelRegression()
        smooth = self._kernel.fit(self._scaler.embedding(seed), self._scaler.signals(seed), seed.label, z, rng)
        tick()
        queries = self._as_queries(seed, exclude=np.arange(count))
        order = torch.from_numpy(rng.permutation(count))
        batch = int(np.clip(count // 16, SMALLEST_BATCH, LARGEST_BATCH))
        held_out = []
        for member in range(MEMBERS):
            held = order[member::FOLDS]
            rows = order[torch.isin(order, held, invert=True)]
            seed_number = int(rng.integers(2**31))
            net = train(queries, self._anchors, rows, self.num_classes, self.epochs, batch, seed_number, tick)
            self._networks.append(net)
            guess = apply(net, queries.take(held), self._anchors).double().numpy()
            held_out.append((z[held.numpy()], smooth[held.numpy()], guess))
        measured, first, second = (np.concatenate(parts) for parts in zip(*held_out))
        apart = second - first
        self._blend = float(np.clip(apart @ (measured - first) / max(float(apart @ apart), 1e-12), 0, 1))

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        if self._kernel is None or not len(nodes):
            return np.full(len(nodes), self._target.mean, np.float32)
        z = (1 - self._blend) * self._kernel.predict(self._scaler.embedding(nodes), self._scaler.signals(nodes), nodes.label)
        if self._blend:
            queries = self._as_queries(nodes)
            networks = torch.stack([apply(net, queries, self._anchors) for net in self._networks]).mean(0)
            z += self._blend * networks.double().numpy()
        return self._target.restore(z)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {"label": self._seed.label, "signals": self._seed.signals, "score": self._anchors.score.numpy()}
        tensors |= {f"scaler.{name}": value for name, value in self._scaler.tensors().items()}
        if self._kernel is not None:
            tensors |= {f"kernel.{name}": value for name, value in self._kernel.tensors().items()}
        for number, net in enumerate(self._networks):
            tensors |= {f"network{number}.{name}": value.numpy() for name, value in net.state_dict().items()}
        meta |= {"mean": self._target.mean, "spread": self._target.spread, "blend": self._blend, "networks": len(self._networks)}
        return tensors, meta | {"epochs": self.epochs}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta)
        try:
            self._target = Target(float(meta["mean"]), float(meta["spread"]))
            self._blend, self.epochs = float(meta["blend"]), int(meta["epochs"])
            self._scaler = Scaler.from_tensors(_below(tensors, "scaler."))
            self._seed = Nodes(self._scored.vectors, tensors["label"], tensors["signals"])
            self._anchors = self._as_anchors(self._seed, tensors["score"])
            self._kernel = None
            if self._target.spread:
                u, v = self._scaler.embedding(self._seed), self._scaler.signals(self._seed)
                self._kernel = KernelRegression.from_tensors(_below(tensors, "kernel."), u, v, self._seed.label)
            self._networks = []
            for number in range(int(meta["networks"])):
                with torch.random.fork_rng(devices=[]):
                    net = AnchorNet(self._anchors.feature.shape[1], self.num_classes)
                net.load_state_dict(
                    {name: torch.from_numpy(value) for name, value in _below(tensors, f"network{number}.").items()}
                )
                self._networks.append(net.eval())
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise RaypipeError(f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again") from None

    def _features(self, nodes: Nodes) -> Tensor:
        return torch.from_numpy(np.concatenate([self._scaler.embedding(nodes), self._scaler.signals(nodes)], 1))

    def _as_anchors(self, seed: Nodes, z: np.ndarray) -> Anchors:
        return Anchors(self._features(seed), torch.from_numpy(seed.label + 1), torch.from_numpy(z.astype(np.float32)))

    def _as_queries(self, nodes: Nodes, exclude: np.ndarray | None = None) -> Queries:
        distance, row = self._scored.search(nodes.embedding, self.neighbours, exclude)
        near = torch.from_numpy(distance / np.float32(self._typical))
        return Queries(self._features(nodes), torch.from_numpy(nodes.label + 1), torch.from_numpy(row), near)


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): np.array(value) for name, value in tensors.items() if name.startswith(prefix)}
