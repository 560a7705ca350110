"""GNN extrapolation as published (arXiv 2506.09010, "Effective Data Pruning through Score Extrapolation", its GNN variant).

The graph joins every sample, scored or not, with its k nearest in embedding space (an edge from each neighbour to the sample), with
weight exp(-d / 2). A node's features are [one-hot label ; embedding]. Three GCN layers, 512, 256 and 1 wide, ReLU, dropout
0.5 after the first two. Mean squared error on the scored nodes, of which a tenth is for validation: the weights with the best
Pearson correlation there are kept. Adam 1e-3, batches of 128, sampled neighbourhoods of [10, 10] in training.

As in the authors' code, training sees two hops of a network with three layers, and inference one hop with all neighbours. The
sampler is written here on the table of neighbours, since PyG's needs compiled extensions. One deviation: scores are standardised
for the fit and restored after it, since raw MoSo scores can be of any scale; for other scores this is a change of units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from raypipe.errors import RaypipeError
from raypipe.extrapolate.base import Nodes, Progress, TransductiveExtrapolator
from raypipe.extrapolate.features import Target
from raypipe.extrapolate.neighbours import NeighbourIndex

WIDTHS = (512, 256)
FAN_OUT = (10, 10)
BATCH = 128
RATE = 1e-3
PREDICT_ROWS = 1024


class Network(nn.Module):
    """Three GCN layers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        first, second = WIDTHS
        self.layers = nn.ModuleList([GCNConv(features, first), GCNConv(first, second), GCNConv(second, 1)])

    def forward(self, x: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
        """x [nodes, features], edges [2, e] from neighbour to node, weight [e] -> [nodes]."""
        for layer in self.layers[:-1]:
            x = F.dropout(layer(x, edges, weight).relu(), 0.5, self.training)
        return self.layers[-1](x, edges, weight)[:, 0]


class GnnPublished(TransductiveExtrapolator):
    """GCN over the graph of all samples."""

    name = "gnn-published"
    default_neighbours = 10
    default_epochs = 25
    fewest = 20

    def fit_graph(self, nodes: Nodes, scored: np.ndarray, score: np.ndarray, progress: Progress | None = None) -> None:
        """Build the graph and learn from the scored nodes. Raises RaypipeError for fewer than 20 of them or bad values."""
        scored = np.asarray(scored, np.int64)
        score = self._check_fit(nodes.take(scored), score)
        self._build_index(nodes.embedding[scored])
        self.attach_graph(nodes)
        spread = float(score.std())
        self._target = Target(float(score.mean()), spread if spread > 1e-9 * abs(float(score.mean())) else 0.0)
        z = (score - self._target.mean) / (self._target.spread or 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self._network = Network(self.num_classes + nodes.embedding.shape[1])
            self._train(scored, torch.from_numpy(z.astype(np.float32)), progress)

    def _train(self, scored: np.ndarray, target: Tensor, progress: Progress | None) -> None:
        rng = np.random.default_rng(self.settings.seed)
        order = rng.permutation(len(scored))
        held, fit = order[: max(2, len(order) // 10)], order[max(2, len(order) // 10) :]
        optimizer = torch.optim.Adam(self._network.parameters(), RATE)
        best, weights = -np.inf, {name: value.clone() for name, value in self._network.state_dict().items()}
        for epoch in range(self.epochs):
            self._network.train()
            shuffled = rng.permutation(fit)
            for start in range(0, len(shuffled), BATCH):
                part = shuffled[start : start + BATCH]
                loss = F.mse_loss(self._forward(scored[part], FAN_OUT, rng), target[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            guess = self._predict(scored[held])
            measured = target[held].numpy()
            apart = float(np.std(guess) * np.std(measured))
            pearson = float(np.corrcoef(guess, measured)[0, 1]) if apart > 0 else -1.0
            if pearson > best:
                best, weights = pearson, {name: value.clone() for name, value in self._network.state_dict().items()}
            if progress is not None:
                progress(epoch + 1, self.epochs)
        self._network.load_state_dict(weights)
        self._network.eval()

    def attach_graph(self, nodes: Nodes) -> None:
        """Build the graph over all `nodes`. Raises RaypipeError for bad labels and embeddings that are not finite."""
        self._check_labels(nodes)
        index = NeighbourIndex(nodes.embedding)
        distance, neighbour = index.search(nodes.embedding, self.neighbours, exclude=np.arange(len(nodes)))
        self._nodes, self._neighbour = nodes, neighbour
        self._weight = np.exp(-distance / 2)

    def predict_rows(self, rows: np.ndarray) -> np.ndarray:
        if not hasattr(self, "_nodes"):
            raise RaypipeError(f"{self.name}: no graph yet; call attach_graph first")
        if not self._target.spread:
            return np.full(len(rows), self._target.mean, np.float32)
        return self._target.restore(self._predict(np.asarray(rows, np.int64)).astype(np.float64))

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        """Standardised predictions with one hop and all neighbours, as published."""
        self._network.eval()
        parts = [np.zeros(0, np.float32)]
        with torch.no_grad():
            for start in range(0, len(rows), PREDICT_ROWS):
                parts.append(self._forward(rows[start : start + PREDICT_ROWS], (self._neighbour.shape[1],), None).numpy())
        return np.concatenate(parts)

    def _forward(self, rows: np.ndarray, fan_out: tuple[int, ...], rng: np.random.Generator | None) -> Tensor:
        """The network on a sampled neighbourhood of `rows`; gives [rows]."""
        chosen, edges, weight = sample_neighbourhood(self._neighbour, self._weight, rows, fan_out, rng)
        one_hot = np.zeros((len(chosen), self.num_classes), np.float32)
        label = self._nodes.label[chosen]
        one_hot[np.flatnonzero(label >= 0), label[label >= 0]] = 1
        features = torch.from_numpy(np.concatenate([one_hot, self._nodes.embedding[chosen]], 1))
        return self._network(features, torch.from_numpy(edges), torch.from_numpy(weight.astype(np.float32)))[: len(rows)]

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {f"network.{name}": value.numpy() for name, value in self._network.state_dict().items()}
        return tensors, meta | {"mean": self._target.mean, "spread": self._target.spread}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta)
        try:
            self._target = Target(float(meta["mean"]), float(meta["spread"]))
            weights = {
                name.removeprefix("network."): torch.from_numpy(np.array(value))
                for name, value in tensors.items()
                if "network." in name
            }
            with torch.random.fork_rng(devices=[]):
                self._network = Network(weights["layers.0.lin.weight"].shape[1])
            self._network.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise RaypipeError(f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again") from None


def sample_neighbourhood(
    neighbour: np.ndarray, weight: np.ndarray, rows: np.ndarray, fan_out: tuple[int, ...], rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some hops of neighbours of `rows`, each sample's drawn once, where it is first met.

    neighbour, weight  table of the graph, [n, k]
    fan_out            neighbours drawn per hop, without replacement; k or more: all
    Returns the samples, `rows` first, int64 [m]; edges from neighbour to sample as positions among them, [2, e]; their weights [e].
    """
    degree = neighbour.shape[1]
    chosen, frontier = rows, rows
    sources, targets, weights = [], [], []
    for count in fan_out:
        columns = np.broadcast_to(np.arange(degree), (len(frontier), degree))
        if count < degree:
            assert rng is not None
            columns = rng.random((len(frontier), degree)).argpartition(count - 1, 1)[:, :count]
        met = np.take_along_axis(neighbour[frontier], columns, 1)
        sources.append(met.reshape(-1))
        targets.append(np.repeat(frontier, met.shape[1]))
        weights.append(np.take_along_axis(weight[frontier], columns, 1).reshape(-1))
        frontier = np.setdiff1d(met, chosen)
        chosen = np.concatenate([chosen, frontier])
    order = np.argsort(chosen, kind="stable")
    ends = np.stack([np.concatenate(sources), np.concatenate(targets)])
    return chosen, order[np.searchsorted(chosen[order], ends)], np.concatenate(weights)
