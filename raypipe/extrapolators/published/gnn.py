"""GNN extrapolation as published (arXiv 2506.09010, "Effective Data Pruning through Score Extrapolation", and its code).

Graph: k nearest neighbours (k = 10) of every sample among all samples, scored or not; edge weight exp(-d / 2), d the Euclidean
distance of embeddings. Node features: [one-hot label ; embedding]. Network: three GCN layers (Kipf & Welling 2017, eq. 2)
in -> 512 -> 256 -> 1, ReLU and dropout 0.5 after the first two. Fit: squared error on the scored samples but a tenth, which chooses
the epoch by its Pearson correlation; Adam 1e-3, batch 128, 25 epochs. Training batches see two hops of at most 10 neighbours,
predictions one hop of all neighbours: that mismatch is the published code's, and is kept.

Deviations, none of which changes what the method can express:
- scores are standardised for the fit and predictions changed back, a pure affine change: MoSo's raw scores may be 1e-4 or 1e3 in
  size, which a learning rate of 1e-3 cannot reach in 25 epochs;
- each predicted sample's neighbourhood is a graph of its own, so that a prediction does not depend on what shares its batch
  (in the published code it does where two samples of a batch are neighbours);
- neighbours are sampled here from the neighbour table; PyG's NeighborLoader needs compiled extensions that cannot be assumed.
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
from raypipe.extrapolators.neighbours import NeighbourIndex, SearchQuality
from raypipe.progress import ProgressCallback

HIDDEN = (512, 256)
FAN_OUT = 10
BATCH = 128
RATE = 1e-3
VALIDATION = 0.1


class PublishedNet(nn.Module):
    """Three GCN layers, equal to `torch_geometric.nn.GCNConv` and a few times as fast in what it is used for here.

    Every node that receives messages receives k of them, so that a layer is a weighted sum over a table and a product with a matrix, in the
    order that takes less; and what no wanted node can see is left out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [GCNConv(width, HIDDEN[0]), GCNConv(HIDDEN[0], HIDDEN[1]), GCNConv(HIDDEN[1], 1)]
        )

    def forward(self, x: Tensor, near: Tensor, weight: Tensor, wanted: int) -> Tensor:
        """What is said of the first nodes, [wanted].

        x             features [n, width];  near, weight  of the first m nodes the rows of their neighbours and the weights of these, [m, k]
        The others receive nothing. `wanted` is at most m.
        """
        degree = torch.ones(len(x))
        degree[: len(near)] += weight.sum(1)
        scale = degree.rsqrt()
        weight = scale[: len(near), None] * weight * scale[near]
        # of the second layer only the wanted nodes and their neighbours are seen by the third
        seen = max(wanted, int(near[:wanted].max()) + 1) if near.numel() else wanted
        layers: list[Any] = list(self.layers)
        first, second, third = layers
        x = _dropped(
            first.lin(_received(x, near, weight, degree, len(x))) + first.bias, self.training
        )
        x = _dropped(
            second.lin(_received(x, near, weight, degree, seen)) + second.bias, self.training
        )
        return (
            _received(third.lin(x), near[:wanted], weight[:wanted], degree, wanted) + third.bias
        )[:, 0]


def _dropped(x: Tensor, training: bool) -> Tensor:
    """ReLU, then dropout of half of the values. `F.dropout` draws a number for each, five times slower than a bit for each; x has a
    multiple of 64 values, as both hidden layers are so wide."""
    x = F.relu(x, inplace=True)
    if not training:
        return x
    drawn = (
        torch.empty(x.numel() // 64, dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
    )
    kept = (
        ((drawn[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).view(torch.bool).view(x.shape)
    )
    return x * kept.to(x.dtype).mul_(2)


def _received(x: Tensor, near: Tensor, weight: Tensor, degree: Tensor, count: int) -> Tensor:
    """For the first `count` nodes, x and what their neighbours send, normalised (Kipf & Welling 2017, eq. 2): [count, width]."""
    near, weight = near[:count], weight[:count]
    summed = (
        F.embedding_bag(near, x, mode="sum", per_sample_weights=weight)
        + x[: len(near)] / degree[: len(near), None]
    )
    return torch.cat([summed, x[len(near) : count]])


class GnnPublished(TransductiveExtrapolator):
    """The published graph network over all samples."""

    name = "gnn-published"
    default_neighbours = 10
    default_epochs = 25
    fewest = 20
    _near: Tensor | None = None
    _quality: SearchQuality | None = None

    def fit_graph(
        self,
        nodes: Nodes,
        scored: np.ndarray,
        score: np.ndarray,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Learn from the graph over `nodes` and the scores, float [m], of those at rows `scored`, int64 [m].

        Raises RaypipeError for fewer than 20 scored samples, rows that are repeated or not there, values that are not finite.
        """
        scored = self._check_rows(np.asarray(scored, dtype=np.int64), len(nodes))
        if len(np.unique(scored)) != len(scored):
            raise RaypipeError(
                f"{self.name}: {len(scored) - len(np.unique(scored))} of {len(scored)} scored rows are repeated"
            )
        score = self._check_fit(nodes.take(scored), score)
        self._build_index(nodes.embedding[scored])
        self.attach_graph(nodes)
        self._mean, self._spread = float(score.mean()), float(score.std())
        if self._spread <= 1e-9 * abs(self._mean):
            self._spread = 0.0
        target = torch.zeros(len(nodes))
        target[torch.from_numpy(scored)] = torch.from_numpy(
            ((score - self._mean) / (self._spread or 1.0)).astype(np.float32)
        )
        rng = np.random.default_rng(self.settings.seed)
        order = torch.from_numpy(rng.permutation(scored))
        held, rows = (
            order[: max(2, round(VALIDATION * len(order)))],
            order[max(2, round(VALIDATION * len(order))) :],
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**31)))
            self._net = PublishedNet(self.num_classes + nodes.embedding.shape[1])
            if self._spread:
                self._train(rows, held, target, progress)
        self._net.eval()

    def _train(
        self, rows: Tensor, held: Tensor, target: Tensor, progress: ProgressCallback | None
    ) -> None:
        optimizer = torch.optim.Adam(self._net.parameters(), RATE)
        best, weights = -np.inf, None
        for epoch in range(self.epochs):
            self._net.train()
            for batch in rows[torch.randperm(len(rows))].split(BATCH):
                loss = F.mse_loss(self._net(*self._sampled(batch), len(batch)), target[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            guess, truth = self._infer(held), target[held]
            centred, other = guess - guess.mean(), truth - truth.mean()
            pearson = float(centred @ other / (centred.norm() * other.norm()).clamp(min=1e-12))
            if pearson > best:
                best, weights = (
                    pearson,
                    {name: value.clone() for name, value in self._net.state_dict().items()},
                )
            if progress is not None:
                progress(epoch + 1, self.epochs)
        if weights is not None:  # None: every epoch's predictions were not finite
            self._net.load_state_dict(weights)

    def attach_graph(self, nodes: Nodes) -> None:
        """Build the graph over all `nodes`. Raises RaypipeError when embeddings do not fit what was fitted, or are not finite."""
        self._check_nodes(nodes)
        rows = np.arange(len(nodes))
        index = NeighbourIndex(nodes.embedding, self.settings.exact_neighbours, self.neighbours)
        distance, near = index.search(nodes.embedding, self.neighbours, exclude=rows)
        self._quality = index.quality
        self._embedding, self._label = (
            torch.from_numpy(nodes.embedding),
            torch.from_numpy(nodes.label),
        )
        self._near, self._weight = (
            torch.from_numpy(near),
            torch.exp(-torch.from_numpy(distance) / 2),
        )

    def predict_rows(self, rows: np.ndarray) -> np.ndarray:
        if self._near is None:
            raise RaypipeError(
                f"{self.name}: no graph; call fit_graph, or load_state and attach_graph, first"
            )
        rows = self._check_rows(np.asarray(rows, dtype=np.int64), len(self._label))
        if not self._spread:
            return np.full(len(rows), self._mean, np.float32)
        z = self._infer(torch.from_numpy(rows)).double().numpy()
        return (z * self._spread + self._mean).astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {
            f"network.{name}": value.numpy() for name, value in self._net.state_dict().items()
        }
        if (
            self._quality is not None
        ):  # of the graph: predictions hang on it, and not on the index of scored samples
            meta |= {"search": self._quality.as_dict()}
        return tensors, meta | {"mean": self._mean, "spread": self._spread, "epochs": self.epochs}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Restore what `state` gave. The graph is not part of it: call `attach_graph` before `predict_rows`."""
        self._load_base(tensors, meta)
        try:
            self._mean, self._spread, self.epochs = (
                float(meta["mean"]),
                float(meta["spread"]),
                int(meta["epochs"]),
            )
            with torch.random.fork_rng(devices=[]):
                self._net = PublishedNet(self.num_classes + self._scored.width).eval()
            weights = {
                name.removeprefix("network."): value
                for name, value in tensors.items()
                if name.startswith("network.")
            }
            self._net.load_state_dict(
                {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
            )
        except (KeyError, RuntimeError) as error:
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again"
            ) from None

    def _check_rows(self, rows: np.ndarray, count: int) -> np.ndarray:
        bad = int(((rows < 0) | (rows >= count)).sum())
        if bad:
            raise RaypipeError(
                f"{self.name}: {bad} of {len(rows)} rows are outside the graph of {count} samples"
            )
        return rows

    def _features(self, rows: Tensor) -> Tensor:
        """[one-hot label ; embedding], made for a batch at a time since all of it may not fit in memory."""
        label = self._label[rows]
        onehot = F.one_hot((label + 1), self.num_classes + 1)[:, 1:].float()
        return torch.cat([onehot, self._embedding[rows]], 1)

    def _neighbours(self, of: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and edge weights of all neighbours, [m, k]."""
        if self._near is None:
            raise RaypipeError(
                f"{self.name}: no graph; call fit_graph, or load_state and attach_graph, first"
            )
        return self._near[of], self._weight[of]

    def _some_neighbours(self, of: Tensor) -> tuple[Tensor, Tensor]:
        near, weight = self._neighbours(of)
        if near.shape[1] <= FAN_OUT:
            return near, weight
        chosen = torch.rand(near.shape).argsort(1)[:, :FAN_OUT]
        return near.gather(1, chosen), weight.gather(1, chosen)

    def _sampled(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The subgraph of two hops around a batch: features of its nodes [n, width], of the first of them neighbours and weights, [m, k].

        The samples of the batch come first, then their neighbours.
        A node met in the first hop is expanded in the second; one met in the second is not. At most 10 neighbours each, drawn
        without replacement.
        """
        first, first_weight = self._some_neighbours(batch)
        fresh = torch.unique(first)
        fresh = fresh[torch.isin(fresh, batch, invert=True)]
        second, second_weight = self._some_neighbours(fresh)
        expanded, source = torch.cat([batch, fresh]), torch.cat([first, second])
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
        """Predictions, in units of the target, each from a sample and its neighbours alone."""
        self._net.eval()
        parts = []
        for batch in rows.split(BATCH):
            near, weight = self._neighbours(batch)
            count, degree = near.shape
            x = self._features(torch.cat([batch, near.flatten()]))
            parts.append(
                self._net(x, torch.arange(count, len(x)).reshape(count, degree), weight, count)
            )
        return torch.cat(parts) if parts else torch.empty(0)
