"""A graph attention network: a sample attends over its nearest scored samples, which carry their scores.

The graph is a neighbour table of fixed degree, so message passing is a gather and a dense softmax: the layer is GATv2
(Brody et al. 2022, "How Attentive are Graph Attention Networks?", eq. 7), equal to `torch_geometric.nn.GATv2Conv` without
self-loops and about twice as fast on CPU. Self-loops must be off: in a bipartite batch they would join query i with neighbour i
of the batch, which belongs to another sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS = 64, 4
PEAK_RATE, DECAY = 1e-2, 1e-2
WARM_UP = 0.1
LONGEST_GRADIENT = 1.0
PREDICT_ROWS = 64
"""Samples predicted at once: what is computed for their neighbours then stays in the cache."""


class FixedDegreeGATv2(nn.Module):
    """GATv2 from k neighbours to each of n samples, heads concatenated: [n, k, hidden], [n, hidden], [n, k, edge] -> [n, hidden]."""

    def __init__(self, hidden: int, heads: int, edge_width: int) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.edge = nn.Linear(edge_width, hidden, bias=False)
        self.attention = nn.Parameter(torch.empty(heads, hidden // heads))
        self.bias = nn.Parameter(torch.zeros(hidden))
        nn.init.xavier_uniform_(self.attention)

    def forward(self, neighbour: Tensor, query: Tensor, edge: Tensor) -> Tensor:
        split = (*edge.shape[:2], *self.attention.shape)
        value = self.source(neighbour).view(split)
        key = (
            value
            + self.target(query).view(len(query), 1, *self.attention.shape)
            + self.edge(edge).view(split)
        )
        weight = (F.leaky_relu(key, 0.2) * self.attention).sum(-1).softmax(1)
        return (weight[..., None] * value).sum(1).flatten(1) + self.bias


@dataclass(frozen=True)
class Anchors:
    """The scored samples: features float32 [n, f], class int64 [n] (0 = unlabelled, class c at c + 1), score float32 [n]."""

    feature: Tensor
    label: Tensor
    score: Tensor


@dataclass(frozen=True)
class Queries:
    """Samples to predict: features [m, f], class [m], rows of their neighbours among the anchors [m, k], distances to them [m, k]."""

    feature: Tensor
    label: Tensor
    neighbour: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor | slice) -> Queries:
        return Queries(
            self.feature[rows], self.label[rows], self.neighbour[rows], self.distance[rows]
        )


class AnchorNet(nn.Module):
    """Predicts a sample's score from its own features and class, and its neighbours': those, their score, whether the class agrees.

    The class is a learned vector, not a one-hot column, so thousands of classes cost nothing; no label is the zero vector.
    """

    def __init__(
        self, width: int, num_classes: int, hidden: int = HIDDEN, heads: int = HEADS
    ) -> None:
        super().__init__()
        self.query_class, self.anchor_class = (
            nn.Embedding(num_classes + 1, hidden, padding_idx=0) for _ in range(2)
        )
        for table in (self.query_class, self.anchor_class):
            nn.init.normal_(table.weight[1:], std=0.3)
        self.query, self.anchor = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.told = nn.Linear(2, hidden, bias=False)  # score, same class
        self.attend = FixedDegreeGATv2(hidden, heads, 1)
        self.out = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1)
        )

    def encode(self, feature: Tensor, label: Tensor) -> Tensor:
        """What an anchor says apart from its score, [n, hidden]: computed once however many samples it is a neighbour of."""
        return self.anchor(feature) + self.anchor_class(label)

    def forward(self, queries: Queries, anchors: Anchors, encoded: Tensor | None = None) -> Tensor:
        near = queries.neighbour
        if encoded is None:
            rows, near = torch.unique(near, return_inverse=True)
            encoded = self.encode(anchors.feature[rows], anchors.label[rows])
        label = anchors.label[queries.neighbour]
        same = ((label == queries.label[:, None]) & (label > 0)).float()
        told = torch.stack([anchors.score[queries.neighbour], same], -1)
        # index_select: its backward pass adds in a fixed order, that of plain indexing need not
        message = encoded.index_select(0, near.flatten()).view(*near.shape, -1) + self.told(told)
        message = F.dropout(F.relu(message), 0.1, self.training)
        own = F.relu(self.query(queries.feature) + self.query_class(queries.label))
        seen = F.relu(self.attend(message, own, queries.distance[..., None]))
        return self.out(torch.cat([seen, own], 1))[:, 0]


def train(
    queries: Queries,
    anchors: Anchors,
    rows: Tensor,
    num_classes: int,
    epochs: int,
    batch: int,
    seed: int,
    tick: Callable[[], None],
) -> AnchorNet:
    """Fit a network to the scores of the anchors at `rows`: squared error, AdamW. `tick` follows each epoch.

    `queries` are the anchors themselves, with a neighbour table in which no sample is its own neighbour: a score to be predicted
    is never among the inputs. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would touch the generators of GPUs too
        net = AnchorNet(anchors.feature.shape[1], num_classes)
        optimizer = torch.optim.AdamW(net.parameters(), PEAK_RATE, weight_decay=DECAY, fused=True)
        steps = epochs * -(-len(rows) // batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _rate((step + 0.5) / steps)
        )
        net.train()
        for _ in range(epochs):
            for part in rows[torch.randperm(len(rows))].split(batch):
                loss = F.mse_loss(net(queries.take(part), anchors), anchors.score[part])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), LONGEST_GRADIENT)
                optimizer.step()
                schedule.step()
            tick()
    return net.eval()


def _rate(share: float) -> float:
    """Learning rate, as a share of its peak, after a share of the steps: up over a tenth, then down as a cosine."""
    return min(
        share / WARM_UP, (1 + math.cos(math.pi * max(0.0, share - WARM_UP) / (1 - WARM_UP))) / 2
    )


@torch.no_grad()
def encode(net: AnchorNet, anchors: Anchors) -> Tensor:
    """`AnchorNet.encode` of all anchors, for many calls of `apply`: it takes as long as thousands of predictions."""
    return net.encode(anchors.feature, anchors.label)


@torch.no_grad()
def apply(
    net: AnchorNet, queries: Queries, anchors: Anchors, encoded: Tensor | None = None
) -> Tensor:
    """Predictions, float32 [m]; `encoded` is what `encode` gives."""
    if encoded is None:
        encoded = encode(net, anchors)
    parts = [
        net(queries.take(slice(start, start + PREDICT_ROWS)), anchors, encoded)
        for start in range(0, len(queries), PREDICT_ROWS)
    ]
    return torch.cat(parts) if parts else torch.empty(0)
