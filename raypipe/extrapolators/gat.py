"""Graph attention network: a sample attends over its nearest scored samples and their scores.

The graph is a neighbour table of fixed degree, so message passing is a gather and a dense softmax.
The layer is GATv2 (Brody et al. 2022, "How Attentive are Graph Attention Networks?", eq. 7). It
equals `torch_geometric.nn.GATv2Conv` without self-loops and is about twice as fast on CPU.
Self-loops must be off: in a bipartite batch they would connect query i with neighbour i of the
batch, which belongs to another sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypipe.vision.optimizers import plain

HIDDEN, HEADS = 64, 4
PEAK_LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-2
WARM_UP = 0.1
"""Share of the steps over which the learning rate rises."""
MAX_GRADIENT_NORM = 1.0
PREDICT_ROWS = 64
"""Samples predicted at once: intermediate values of their neighbours then stay in the cache."""


class FixedDegreeGATv2(nn.Module):
    """GATv2 from k neighbours to each of n samples; the heads are concatenated."""

    def __init__(self, hidden: int, heads: int, edge_width: int) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.edge = nn.Linear(edge_width, hidden, bias=False)
        self.attention = nn.Parameter(torch.empty(heads, hidden // heads))
        self.bias = nn.Parameter(torch.zeros(hidden))
        nn.init.xavier_uniform_(self.attention)

    def forward(self, neighbour: Tensor, query: Tensor, edge: Tensor) -> Tensor:
        """Map [n, k, hidden], [n, hidden] and [n, k, edge_width] to [n, hidden]."""
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
    """The scored samples.

    Attributes
    ----------
    feature
        float32 [n, f].
    label
        Class, int64 [n]: 0 for unlabelled, c + 1 for class c.
    score
        Standardised scores, float32 [n].
    """

    feature: Tensor
    label: Tensor
    score: Tensor


@dataclass(frozen=True)
class Queries:
    """Samples to predict.

    Attributes
    ----------
    feature, label
        As in `Anchors`, [m, f] and [m].
    neighbour
        Rows of their nearest anchors, int64 [m, k].
    distance
        Distances to these, float32 [m, k].
    """

    feature: Tensor
    label: Tensor
    neighbour: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor | slice) -> Queries:
        """Return the samples at `rows`."""
        return Queries(
            self.feature[rows], self.label[rows], self.neighbour[rows], self.distance[rows]
        )


class AnchorNet(nn.Module):
    """Predicts a score from a sample's own features and class and from its scored neighbours.

    A neighbour contributes its features, its class, its score and whether its class is the
    sample's. A class is a learned vector, not a one-hot column, so thousands of classes cost
    nothing. A missing label is the zero vector.
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
        # of a neighbour's score and "same class"; stored networks know this layer as `told`
        self.told = nn.Linear(2, hidden, bias=False)
        self.attend = FixedDegreeGATv2(hidden, heads, 1)
        self.out = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1)
        )

    def encode(self, feature: Tensor, label: Tensor) -> Tensor:
        """Encode an anchor's features and class, [n, hidden].

        This does not depend on the query, so it is computed once per anchor.
        """
        return self.anchor(feature) + self.anchor_class(label)

    def forward(self, queries: Queries, anchors: Anchors, encoded: Tensor | None = None) -> Tensor:
        """Return predictions, float32 [m]; `encoded` is `encode` of all anchors."""
        near = queries.neighbour
        if encoded is None:
            rows, near = torch.unique(near, return_inverse=True)
            encoded = self.encode(anchors.feature[rows], anchors.label[rows])
        label = anchors.label[queries.neighbour]
        same = ((label == queries.label[:, None]) & (label > 0)).float()
        score_and_same = torch.stack([anchors.score[queries.neighbour], same], -1)
        # the backward pass of index_select adds in a fixed order; that of plain indexing might not
        gathered = encoded.index_select(0, near.flatten()).view(*near.shape, -1)
        message = gathered + self.told(score_and_same)
        message = F.dropout(F.relu(message), 0.1, self.training)
        own = F.relu(self.query(queries.feature) + self.query_class(queries.label))
        attended = F.relu(self.attend(message, own, queries.distance[..., None]))
        return self.out(torch.cat([attended, own], 1))[:, 0]


def train(
    queries: Queries,
    anchors: Anchors,
    rows: Tensor,
    num_classes: int,
    epochs: int,
    batch: int,
    seed: int,
    on_epoch: Callable[[], None],
) -> AnchorNet:
    """Fit a network to the scores of some anchors: squared error, AdamW.

    The global random state stays as it was.

    Parameters
    ----------
    queries
        The anchors themselves, with a neighbour table in which no sample is its own neighbour: the
        score to be predicted is never among the inputs.
    anchors
        The scored samples.
    rows
        Anchors to fit on, int64 [r].
    num_classes
        Number of classes.
    epochs, batch
        Passes over `rows`, and samples per step.
    seed
        Of the initial weights, the order of samples and the dropout.
    on_epoch
        Called after each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the generators of the GPUs
        torch.default_generator.manual_seed(seed)
        net = AnchorNet(anchors.feature.shape[1], num_classes)
        optimizer = plain(torch.optim.AdamW)(
            net.parameters(), PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        steps = epochs * -(-len(rows) // batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _rate_factor((step + 0.5) / steps)
        )
        net.train()
        for _ in range(epochs):
            for part in rows[torch.randperm(len(rows))].split(batch):
                loss = F.mse_loss(net(queries.take(part), anchors), anchors.score[part])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()
                schedule.step()
            on_epoch()
    return net.eval()


def _rate_factor(progress: float) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, then cosine decay."""
    cosine = (1 + math.cos(math.pi * max(0.0, progress - WARM_UP) / (1 - WARM_UP))) / 2
    return min(progress / WARM_UP, cosine)


@torch.no_grad()
def encode(net: AnchorNet, anchors: Anchors) -> Tensor:
    """Return `AnchorNet.encode` of all anchors, to reuse in many calls of `apply`.

    It takes as long as thousands of predictions.
    """
    return net.encode(anchors.feature, anchors.label)


@torch.no_grad()
def apply(
    net: AnchorNet, queries: Queries, anchors: Anchors, encoded: Tensor | None = None
) -> Tensor:
    """Return predictions, float32 [m]; `encoded` is the result of `encode`."""
    if encoded is None:
        encoded = encode(net, anchors)
    # always as many rows at a time: a prediction does not depend on the others, bit for bit
    last = len(queries) - 1
    parts = [
        net(
            queries.take(torch.arange(start, start + PREDICT_ROWS).clamp_(max=last)),
            anchors,
            encoded,
        )
        for start in range(0, len(queries), PREDICT_ROWS)
    ]
    return torch.cat(parts)[: len(queries)] if parts else torch.empty(0)
