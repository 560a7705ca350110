"""GNN extrapolation as published.

Source: arXiv 2506.09010, "Effective Data Pruning through Score Extrapolation", and its code.

Graph: k nearest neighbours (k = 10) of every sample among all samples, scored or not; edge weight
exp(-d / 2), d the Euclidean distance of the embeddings. Node features: [one-hot label ; embedding].
Network: three GCN layers (Kipf & Welling 2017, eq. 2), in -> 512 -> 256 -> 1, with ReLU and dropout
0.5 after the first two. Fit: squared error on the scored samples except a tenth, which selects the
epoch by its Pearson correlation; Adam 1e-3, batch 128, 25 epochs. Training batches see two hops of
at most 10 neighbours, predictions one hop of all neighbours. This mismatch is in the published code
and is preserved.

Deviations, of which only the last changes what the method can express:

- Scores are standardised for the fit and predictions mapped back, which is affine. MoSo's raw
  scores can be of size 1e-4 or 1e3, which a learning rate of 1e-3 cannot reach in 25 epochs.
- The neighbourhood of each predicted sample is a graph of its own, so a prediction does not depend
  on what shares its batch. In the published code it does if two samples of a batch are neighbours.
- Neighbours are sampled from the neighbour table. PyG's NeighborLoader needs compiled extensions
  that cannot be assumed.
- No prediction leaves the range of the measured scores (`features.Bounds`).

An unlabelled sample has no one-hot entry.
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
from raypipe.extrapolators.base import Nodes, TransductiveExtrapolator
from raypipe.extrapolators.features import Bounds
from raypipe.extrapolators.neighbours import NeighbourIndex, SearchQuality
from raypipe.progress import ProgressCallback
from raypipe.vision.optimizers import plain

HIDDEN = (512, 256)
FAN_OUT = 10
"""Maximum number of neighbours per node in a training batch."""
BATCH = 128
LEARNING_RATE = 1e-3
VALIDATION = 0.1
"""Share of the scored samples that selects the epoch."""


class PublishedNet(nn.Module):
    """Three GCN layers, equal to `torch_geometric.nn.GCNConv` and a few times as fast here.

    Every node that receives messages receives k of them. A layer is therefore a weighted sum over a
    table and a matrix product, in the cheaper order. Nodes that no output depends on are left out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [GCNConv(width, HIDDEN[0]), GCNConv(HIDDEN[0], HIDDEN[1]), GCNConv(HIDDEN[1], 1)]
        )

    def forward(self, x: Tensor, near: Tensor, weight: Tensor, outputs: int) -> Tensor:
        """Return the predictions for the first `outputs` nodes, [outputs].

        Parameters
        ----------
        x
            Features of n nodes, [n, width].
        near, weight
            Rows of the neighbours of the first m nodes, and the edge weights, [m, k]. The other
            nodes receive no messages.
        outputs
            Number of predictions, at most m.
        """
        degree = torch.ones(len(x))
        degree[: len(near)] += weight.sum(1)
        scale = degree.rsqrt()
        weight = scale[: len(near), None] * weight * scale[near]
        # the third layer reads only the outputs and their neighbours from the second
        visible = max(outputs, int(near[:outputs].max()) + 1) if near.numel() else outputs
        layers: list[Any] = list(self.layers)
        first, second, third = layers
        x = first.lin(_aggregated(x, near, weight, degree, len(x))) + first.bias
        x = _dropped(x, self.training)
        x = second.lin(_aggregated(x, near, weight, degree, visible)) + second.bias
        x = _dropped(x, self.training)
        x = _aggregated(third.lin(x), near[:outputs], weight[:outputs], degree, outputs)
        return (x + third.bias)[:, 0]


def _dropped(x: Tensor, training: bool) -> Tensor:
    """Apply ReLU, then drop half of the values during training.

    `F.dropout` draws a number per value, which is five times slower than one random bit per value.
    The number of values in x must be a multiple of 64; the widths of both hidden layers ensure
    this.
    """
    x = F.relu(x, inplace=True)
    if not training:
        return x
    words = torch.empty(x.numel() // 64, dtype=torch.int64).random_(-(2**63), None)
    octets = words.view(torch.uint8)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    mask = bits.view(torch.bool).view(x.shape)
    return x * mask.to(x.dtype).mul_(2)


def _aggregated(x: Tensor, near: Tensor, weight: Tensor, degree: Tensor, count: int) -> Tensor:
    """Add to each of the first `count` nodes its normalised messages, [count, width].

    Kipf & Welling 2017, eq. 2; nodes beyond `near` receive none.
    """
    near, weight = near[:count], weight[:count]
    messages = F.embedding_bag(near, x, mode="sum", per_sample_weights=weight)
    summed = messages + x[: len(near)] / degree[: len(near), None]
    return torch.cat([summed, x[len(near) : count]])


class GnnPublished(TransductiveExtrapolator):
    """The published graph network over all samples."""

    name = "gnn-published"
    default_neighbours = 10
    default_epochs = 25
    min_samples = 20
    _near: Tensor | None = None
    _quality: SearchQuality | None = None

    def fit_graph(
        self,
        nodes: Nodes,
        scored: np.ndarray,
        score: np.ndarray,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Learn from the graph over all samples and the scores of some.

        Raises
        ------
        RaypipeError
            There are fewer than 20 scored samples, a row is repeated or outside the graph, or a
            value is not finite.
        """
        scored = self._check_rows(np.asarray(scored, dtype=np.int64), len(nodes))
        repeated = len(scored) - len(np.unique(scored))
        if repeated:
            raise RaypipeError(f"{self.name}: {repeated} of {len(scored)} scored rows are repeated")
        score = self._check_fit(nodes.take(scored), score)
        self._build_index(nodes.embedding[scored])
        self.attach_graph(nodes)
        self._mean, self._spread = float(score.mean()), float(score.std())
        if self._spread <= 1e-9 * abs(self._mean):
            self._spread = 0.0
        self._bounds = Bounds.fit(score)
        standardised = (score - self._mean) / (self._spread or 1.0)
        target = torch.zeros(len(nodes))
        target[torch.from_numpy(scored)] = torch.from_numpy(standardised.astype(np.float32))
        rng = np.random.default_rng(self.settings.seed)
        order = torch.from_numpy(rng.permutation(scored))
        validation_count = max(2, round(VALIDATION * len(order)))
        held, rows = order[:validation_count], order[validation_count:]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**31)))
            self._net = PublishedNet(self.num_classes + nodes.embedding.shape[1])
            if self._spread:
                self._train(rows, held, target, progress)
        self._net.eval()

    def _train(
        self, rows: Tensor, held: Tensor, target: Tensor, progress: ProgressCallback | None
    ) -> None:
        """Fit the network to `rows` and leave it at its best epoch on `held`."""
        optimizer = plain(torch.optim.Adam)(self._net.parameters(), LEARNING_RATE)
        best_pearson, weights = -np.inf, None
        for epoch in range(self.epochs):
            self._net.train()
            for batch in rows[torch.randperm(len(rows))].split(BATCH):
                loss = F.mse_loss(self._net(*self._subgraph(batch), len(batch)), target[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            pearson = _pearson(self._infer(held), target[held])
            if pearson > best_pearson:
                best_pearson = pearson
                weights = {name: value.clone() for name, value in self._net.state_dict().items()}
            if progress is not None:
                progress(epoch + 1, self.epochs)
        if weights is not None:  # None: no epoch had finite predictions
            self._net.load_state_dict(weights)

    def attach_graph(self, nodes: Nodes) -> None:
        """Build the graph over all `nodes`.

        Raises
        ------
        RaypipeError
            Embeddings are not finite, or their width differs from the fit.
        """
        self._check_nodes(nodes)
        rows = np.arange(len(nodes))
        index = NeighbourIndex(nodes.embedding, self.settings.exact_neighbours, self.neighbours)
        distance, near = index.search(nodes.embedding, self.neighbours, exclude=rows)
        self._quality = index.quality
        self._embedding = torch.from_numpy(nodes.embedding)
        self._label = torch.from_numpy(nodes.label)
        self._near = torch.from_numpy(near)
        self._weight = torch.exp(-torch.from_numpy(distance) / 2)

    def predict_rows(self, rows: np.ndarray) -> np.ndarray:
        self._check_graph()
        rows = self._check_rows(np.asarray(rows, dtype=np.int64), len(self._label))
        if not self._spread:
            return np.full(len(rows), self._mean, np.float32)
        z = self._infer(torch.from_numpy(rows)).double().numpy()
        return self._bounds(z * self._spread + self._mean)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {
            f"network.{name}": value.numpy() for name, value in self._net.state_dict().items()
        }
        # predictions depend on the search behind the graph, not on the index of scored samples
        if self._quality is not None:
            meta |= {"search": self._quality.as_dict()}
        meta |= {"mean": self._mean, "spread": self._spread, "bounds": self._bounds.state()}
        return tensors, meta | {"epochs": self.epochs}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Restore from `state`, which has no graph: call `attach_graph` before `predict_rows`."""
        self._load_base(tensors, meta)
        try:
            self._mean, self._spread = float(meta["mean"]), float(meta["spread"])
            self.epochs = int(meta["epochs"])
            self._bounds = Bounds.from_meta(meta)
            with torch.random.fork_rng(devices=[]):
                self._net = PublishedNet(self.num_classes + self._scored.width).eval()
            weights = {
                name.removeprefix("network."): torch.from_numpy(np.array(value))
                for name, value in tensors.items()
                if name.startswith("network.")
            }
            self._net.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise self._damaged(error) from None

    def _check_rows(self, rows: np.ndarray, count: int) -> np.ndarray:
        bad = int(((rows < 0) | (rows >= count)).sum())
        if bad:
            raise RaypipeError(
                f"{self.name}: {bad} of {len(rows)} rows are outside the graph of {count} samples"
            )
        return rows

    def _check_graph(self) -> Tensor:
        """Return the neighbour table, or raise RaypipeError if there is no graph."""
        if self._near is None:
            raise RaypipeError(
                f"{self.name}: no graph; call fit_graph, or load_state and attach_graph, first"
            )
        return self._near

    def _features(self, rows: Tensor) -> Tensor:
        """Return [one-hot label ; embedding] of a batch: all samples might not fit in memory."""
        label = self._label[rows]
        onehot = F.one_hot((label + 1), self.num_classes + 1)[:, 1:].float()
        return torch.cat([onehot, self._embedding[rows]], 1)

    def _neighbours(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and edge weights of all neighbours, [m, k]."""
        return self._check_graph()[rows], self._weight[rows]

    def _sampled_neighbours(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return at most `FAN_OUT` neighbours of each sample, drawn without replacement."""
        near, weight = self._neighbours(rows)
        if near.shape[1] <= FAN_OUT:
            return near, weight
        chosen = torch.rand(near.shape).argsort(1)[:, :FAN_OUT]
        return near.gather(1, chosen), weight.gather(1, chosen)

    def _subgraph(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample the subgraph of two hops around a batch.

        The samples of the batch come first, then their neighbours. A node that the first hop
        reaches is expanded in the second; one that the second reaches is not.

        Returns
        -------
        features
            Of the n nodes, [n, width].
        near, weight
            Neighbours and edge weights of the first m nodes, [m, k].
        """
        first, first_weight = self._sampled_neighbours(batch)
        reached = torch.unique(first)
        reached = reached[torch.isin(reached, batch, invert=True)]
        second, second_weight = self._sampled_neighbours(reached)
        expanded, source = torch.cat([batch, reached]), torch.cat([first, second])
        outer = torch.unique(second)
        nodes = torch.cat([expanded, outer[torch.isin(outer, expanded, invert=True)]])
        ordered, place = nodes.sort()
        return (
            self._features(nodes),
            place[torch.searchsorted(ordered, source)],
            torch.cat([first_weight, second_weight]),
        )

    @torch.no_grad()
    def _infer(self, rows: Tensor) -> Tensor:
        """Return standardised predictions, each from a sample and its neighbours alone."""
        self._net.eval()
        parts = []
        # always as many rows at a time: a prediction does not depend on the others, bit for bit
        for start in range(0, len(rows), BATCH):
            batch = rows[torch.arange(start, start + BATCH).clamp_(max=len(rows) - 1)]
            near, weight = self._neighbours(batch)
            count, degree = near.shape
            x = self._features(torch.cat([batch, near.flatten()]))
            parts.append(
                self._net(x, torch.arange(count, len(x)).reshape(count, degree), weight, count)
            )
        return torch.cat(parts)[: len(rows)] if parts else torch.empty(0)


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-12))
