"""Network on a sample's own embedding and class. It sees no neighbours: the graph must beat it.

This is the baseline that reviewers of arXiv 2506.09010 ("Effective Data Pruning through Score
Extrapolation") requested and that its later code contains: [one-hot label ; embedding] -> 256 -> 64
-> 1, with ReLU and dropout 0.5 after the first two layers. Here the prediction is the mean of three
networks. Each is fitted on all scored samples except another tenth, which selects the epoch by
squared error. Embeddings and scores are standardised. An unlabelled sample has no one-hot entry.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.extrapolators.features import Bounds, Scaler, Target
from raypipe.progress import ProgressCallback
from raypipe.vision.devices import padded
from raypipe.vision.optimizers import plain

HIDDEN = (256, 64)
DROPOUT = 0.5
MEMBERS, FOLDS = 3, 10
"""Networks, and the parts of the seed set of which each leaves out another one."""
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2
BATCH = 64
PATIENCE = 10
"""A fit ends after this many epochs without improvement."""
PREDICT_ROWS = 64
"""Samples predicted at once, always as many: the last ones are padded."""


class MlpNet(nn.Module):
    """Three dense layers.

    The one-hot columns of the first are a table of vectors, so thousands of classes cost nothing.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(width, HIDDEN[0])
        self.label = nn.Embedding(num_classes + 1, HIDDEN[0], padding_idx=0)
        self.hidden, self.out = nn.Linear(HIDDEN[0], HIDDEN[1]), nn.Linear(HIDDEN[1], 1)
        bound = width**-0.5  # nn.Linear draws its weights from this range
        nn.init.uniform_(self.label.weight[1:], -bound, bound)

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """Map embedding [n, width] and class [n] (0 for unlabelled, c + 1 for class c) to [n]."""
        x = F.dropout(F.relu(self.embedding(embedding) + self.label(label)), DROPOUT, self.training)
        return self.out(F.dropout(F.relu(self.hidden(x)), DROPOUT, self.training))[:, 0]


class Mlp(Extrapolator):
    """Three small networks on embedding and class."""

    name = "mlp"
    default_neighbours = 20
    default_epochs = 60
    min_samples = 20

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Learn from the seed set and its measured scores, float [n].

        Raises
        ------
        RaypipeError
            There are fewer than 20 samples, scores or embeddings are not finite, or labels are out
            of range.
        """
        score = self._check_fit(seed, score)
        self._build_index(seed.embedding)
        self._scaler = Scaler.fit(seed)
        self._target, z = Target.fit(score)
        self._bounds = Bounds.fit(self._target.unscaled(z))
        self._networks: list[MlpNet] = []
        total = MEMBERS * self.epochs
        if self._target.spread:
            x, y = self._inputs(seed)
            target = torch.from_numpy(z.astype(np.float32))
            rng = np.random.default_rng(self.settings.seed)
            order = torch.from_numpy(rng.permutation(len(seed)))
            for member in range(MEMBERS):
                held = order[member::FOLDS]
                rows = order[torch.isin(order, held, invert=True)]
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(int(rng.integers(2**31)))
                    net = MlpNet(x.shape[1], self.num_classes)
                    for epoch in self._train(net, x, y, target, rows, held):
                        if progress is not None:
                            progress(member * self.epochs + epoch, total)
                self._networks.append(net.eval())
        if progress is not None:
            progress(total, total)

    def _train(
        self, net: MlpNet, x: Tensor, y: Tensor, target: Tensor, rows: Tensor, held: Tensor
    ) -> Iterator[int]:
        """Fit a network and leave it at its best epoch; yield the number of each finished epoch."""
        optimizer = plain(torch.optim.AdamW)(
            net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        best_error, best_epoch, weights = np.inf, 0, copy.deepcopy(net.state_dict())
        for epoch in range(1, self.epochs + 1):
            net.train()
            for part in rows[torch.randperm(len(rows))].split(BATCH):
                loss = F.mse_loss(net(x[part], y[part]), target[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            net.eval()
            with torch.no_grad():
                error = float(F.mse_loss(net(x[held], y[held]), target[held]))
            if error < best_error:
                best_error, best_epoch = error, epoch
                weights = copy.deepcopy(net.state_dict())
            yield epoch
            if epoch - best_epoch >= PATIENCE:
                break
        net.load_state_dict(weights)

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        return self._bounds(self._target.unscaled(self._member_predictions(nodes).mean(0)))

    def doubt(self, nodes: Nodes) -> np.ndarray:
        return self.predict_with_doubt(nodes)[1]

    def predict_with_doubt(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        difficulty = self.difficulty(nodes)
        members = self._member_predictions(nodes)
        doubt = self._doubts(nodes, difficulty, disagreement=members.std(0))
        return self._bounds(self._target.unscaled(members.mean(0))), doubt

    @torch.no_grad()
    def _member_predictions(self, nodes: Nodes) -> np.ndarray:
        """Return the predictions of the networks in standard units, float64 [members, n]."""
        if not self._networks:
            return np.zeros((1, len(nodes)))
        x, y = self._inputs(nodes)
        z = torch.empty(len(self._networks), len(nodes))
        for start in range(0, len(nodes), PREDICT_ROWS):
            part = slice(start, start + PREDICT_ROWS)
            own = padded(x[part], PREDICT_ROWS), padded(y[part], PREDICT_ROWS)
            z[:, part] = torch.stack([net(*own) for net in self._networks])[:, : len(x[part])]
        return z.double().numpy()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {f"scaler.{name}": value for name, value in self._scaler.tensors().items()}
        for number, net in enumerate(self._networks):
            tensors |= {
                f"network{number}.{name}": value.numpy() for name, value in net.state_dict().items()
            }
        meta |= {
            "mean": self._target.mean,
            "spread": self._target.spread,
            "bounds": self._bounds.state(),
            "networks": len(self._networks),
        }
        return tensors, meta | {"epochs": self.epochs}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta)
        try:
            self._target = Target(float(meta["mean"]), float(meta["spread"]))
            self._bounds = Bounds.from_meta(meta)
            self.epochs = int(meta["epochs"])
            self._scaler = Scaler.from_tensors(
                {name: tensors[f"scaler.{name}"] for name in ("mean", "spread", "knots")}
            )
            self._networks = []
            for number in range(int(meta["networks"])):
                with torch.random.fork_rng(devices=[]):
                    net = MlpNet(self._scored.width, self.num_classes)
                weights = {
                    name: torch.from_numpy(np.array(tensors[f"network{number}.{name}"]))
                    for name in net.state_dict()
                }
                net.load_state_dict(weights)
                self._networks.append(net.eval())
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from None

    def _inputs(self, nodes: Nodes) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._scaler.embedding(nodes)), torch.from_numpy(nodes.label + 1)
