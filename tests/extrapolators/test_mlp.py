"""The stacked networks of `mlp` compute what separate ones would."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raypipe.config import ExtrapolateSettings
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.mlp import BATCH, MEMBERS, Mlp, MlpNets, _batches


def one_network(nets: MlpNets, number: int, embedding: Tensor, label: Tensor) -> Tensor:
    """The formula, for one network: [one-hot label ; embedding] -> 256 -> 64 -> 1."""
    weights = {name: value[number] for name, value in nets.state_dict().items()}
    hot = F.one_hot(label, len(weights["label_weight"]))[:, 1:].to(embedding)  # 0 has no label
    wide = torch.cat((weights["label_weight"][1:].T, weights["embedding_weight"]), 1)
    x = F.relu(F.linear(torch.cat((hot, embedding), 1), wide, weights["embedding_bias"]))
    x = F.relu(F.linear(x, weights["hidden_weight"], weights["hidden_bias"]))
    return F.linear(x, weights["out_weight"], weights["out_bias"])[:, 0]


def test_stacked_networks_agree_with_separate_ones() -> None:
    torch.manual_seed(0)
    nets = MlpNets(3, 8, 5).double().eval()
    embedding, label = torch.randn(3, 7, 8).double(), torch.randint(0, 6, (3, 7))
    stacked = nets(embedding, label)
    for number in range(3):
        alone = one_network(nets, number, embedding[number], label[number])
        torch.testing.assert_close(stacked[number], alone)


def test_no_network_learns_from_another() -> None:
    torch.manual_seed(0)
    nets = MlpNets(3, 8, 5)
    out = nets(torch.randn(3, 7, 8), torch.randint(0, 6, (3, 7)))
    out[1].sum().backward()
    for parameter in nets.parameters():
        assert parameter.grad is not None
        assert parameter.grad[1].abs().sum() > 0
        assert not parameter.grad[[0, 2]].any()


def test_batches_hold_every_row_once_and_weigh_it_as_a_mean_does() -> None:
    rows = [torch.arange(100), torch.arange(100), torch.arange(99)]
    seen: list[list[int]] = [[], [], []]
    for part, weight in _batches(rows):
        assert part.shape == weight.shape and part.shape[1] <= BATCH
        torch.testing.assert_close(weight.sum(1), torch.ones(3))
        for member in range(3):
            assert len(weight[member].unique()) <= 2  # equal weights, and 0
            seen[member] += part[member][weight[member] > 0].tolist()
    assert seen == [part.tolist() for part in rows]


def test_unlabelled_samples_have_no_vector_after_a_fit_either() -> None:
    rng = np.random.default_rng(0)
    nodes = Nodes(
        rng.normal(size=(61, 4)).astype(np.float32),
        rng.integers(-1, 3, 61),
        np.zeros((61, 0), np.float32),
    )
    model = Mlp(ExtrapolateSettings(method="mlp", epochs=3), 3)
    model.fit(nodes, nodes.embedding[:, 0] + nodes.label)
    tensors = model.state()[0]
    for number in range(MEMBERS):
        table = tensors[f"network{number}.label.weight"]
        assert not table[0].any() and table[1:].any(1).all()
