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


class MlpNets(nn.Module):
    """Several networks of three dense layers with stacked weights, which are evaluated at once.

    The one-hot columns of the first layer are a table of vectors, so thousands of classes cost
    nothing.
    """

    def __init__(self, members: int, width: int, num_classes: int) -> None:
        super().__init__()
        first, second = HIDDEN

        def drawn(inputs: int, *shape: int) -> nn.Parameter:
            bound = inputs**-0.5  # nn.Linear draws its weights from this range
            return nn.Parameter(torch.empty(members, *shape).uniform_(-bound, bound))

        self.embedding_weight = drawn(width, first, width)
        self.embedding_bias = drawn(width, first)
        self.label_weight = drawn(width, num_classes + 1, first)
        self.hidden_weight = drawn(first, second, first)
        self.hidden_bias = drawn(first, second)
        self.out_weight = drawn(second, 1, second)
        self.out_bias = drawn(second, 1)
        with torch.no_grad():
            self.label_weight[:, 0] = 0

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """Map embedding [members, n, width] and class [members, n] to [members, n].

        Class 0 is unlabelled, class c is c + 1.
        """
        table = label + self.label_weight.shape[1] * torch.arange(len(label))[:, None]
        of_label = F.embedding(table, self.label_weight.flatten(0, 1)) * (label > 0)[..., None]
        x = _dense(embedding, self.embedding_weight, self.embedding_bias) + of_label
        x = F.dropout(F.relu(x), DROPOUT, self.training)
        x = F.dropout(
            F.relu(_dense(x, self.hidden_weight, self.hidden_bias)), DROPOUT, self.training
        )
        return _dense(x, self.out_weight, self.out_bias)[..., 0]


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


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
        self._networks: MlpNets | None = None
        if self._target.spread:
            self._train(seed, z, progress)
        if progress is not None:
            progress(self.epochs, self.epochs)

    def _train(self, seed: Nodes, z: np.ndarray, progress: ProgressCallback | None) -> None:
        """Fit the networks side by side, and leave each at its best epoch.

        A network that has ended is trained along with the others, without effect.
        """
        x, y = self._inputs(seed)
        target = torch.from_numpy(z.astype(np.float32))
        rng = np.random.default_rng(self.settings.seed)
        order = torch.from_numpy(rng.permutation(len(seed)))
        held = [order[member::FOLDS] for member in range(MEMBERS)]
        rows = [order[torch.isin(order, part, invert=True)] for part in held]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**31)))
            nets = MlpNets(MEMBERS, x.shape[1], self.num_classes)
            optimizer = plain(torch.optim.AdamW)(
                nets.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
            )
            best = copy.deepcopy(nets.state_dict())
            best_error, best_epoch = np.full(MEMBERS, np.inf), np.zeros(MEMBERS, np.int64)
            for epoch in range(1, self.epochs + 1):
                nets.train()
                shuffled = [part[torch.randperm(len(part))] for part in rows]
                for part, weight in _batches(shuffled):
                    loss = (weight * (nets(x[part], y[part]) - target[part]) ** 2).sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                nets.eval()
                error = _errors(nets, x, y, target, held)
                going_on = epoch - best_epoch <= PATIENCE
                for member in np.flatnonzero(going_on & (error < best_error)):
                    best_error[member], best_epoch[member] = error[member], epoch
                    for name, value in nets.state_dict().items():
                        best[name][member] = value[member]
                if progress is not None:
                    progress(epoch, self.epochs)
                if (epoch - best_epoch >= PATIENCE).all():
                    break
        nets.load_state_dict(best)
        self._networks = nets

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
        if self._networks is None:
            return np.zeros((1, len(nodes)))
        x, y = self._inputs(nodes)
        z = torch.empty(MEMBERS, len(nodes))
        for start in range(0, len(nodes), PREDICT_ROWS):
            part = slice(start, start + PREDICT_ROWS)
            own = padded(x[part], PREDICT_ROWS), padded(y[part], PREDICT_ROWS)
            predicted = self._networks(*(values.expand(MEMBERS, *values.shape) for values in own))
            z[:, part] = predicted[:, : len(x[part])]
        return z.double().numpy()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {f"scaler.{name}": value for name, value in self._scaler.tensors().items()}
        if self._networks is not None:
            for name, value in self._networks.state_dict().items():
                for number in range(MEMBERS):
                    tensors[_stored_name(number, name)] = value[number].numpy()
        meta |= {
            "mean": self._target.mean,
            "spread": self._target.spread,
            "bounds": self._bounds.state(),
            "networks": 0 if self._networks is None else MEMBERS,
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
            self._networks = None
            if int(meta["networks"]):
                with torch.random.fork_rng(devices=[]):
                    nets = MlpNets(MEMBERS, self._scored.width, self.num_classes)
                weights = {
                    name: torch.from_numpy(
                        np.stack([tensors[_stored_name(number, name)] for number in range(MEMBERS)])
                    )
                    for name in nets.state_dict()
                }
                nets.load_state_dict(weights)
                self._networks = nets.eval()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from None

    def _inputs(self, nodes: Nodes) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._scaler.embedding(nodes)), torch.from_numpy(nodes.label + 1)


def _batches(rows: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the rows of every network into batches.

    Parameters
    ----------
    rows : list of Tensor
        Rows of each network, int64 [n]; their numbers differ by at most 1.

    Yields
    ------
    rows : Tensor
        int64 [members, batch]; a network with one row less has row 0 with weight 0.
    weight : Tensor
        float32 [members, batch]; the sum of each network's weighted errors is their mean.
    """
    longest = max(len(part) for part in rows)
    for start in range(0, longest, BATCH):
        parts = [part[start : start + BATCH] for part in rows]
        size = max(len(part) for part in parts)
        weight = torch.zeros(len(rows), size)
        for member, part in enumerate(parts):
            weight[member, : len(part)] = 1 / max(len(part), 1)
        yield torch.stack([F.pad(part, (0, size - len(part))) for part in parts]), weight


@torch.no_grad()
def _errors(nets: MlpNets, x: Tensor, y: Tensor, target: Tensor, held: list[Tensor]) -> np.ndarray:
    """Return each network's mean squared error on its held-out rows, float64 [members]."""
    size = max(len(part) for part in held)
    rows = torch.stack([F.pad(part, (0, size - len(part))) for part in held])
    square = (nets(x[rows], y[rows]) - target[rows]) ** 2
    return np.array([float(square[n, : len(part)].mean()) for n, part in enumerate(held)])


def _stored_name(number: int, name: str) -> str:
    return f"network{number}.{name.replace('_', '.')}"
