from __future__ import annotations

import numpy as np
import pytest
import torch

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.neighbours import NeighbourIndex
from raypipe.extrapolators.published.gnn import FAN_OUT, GnnPublished, PublishedNet, _dropped


@pytest.fixture
def fitted(problem, settings) -> tuple[GnnPublished, Nodes, np.ndarray]:
    nodes, score = problem(150)
    gnn = GnnPublished(settings("gnn-published", epochs=3), 4)
    gnn.fit_graph(nodes, np.arange(60), score[:60])
    return gnn, nodes, score


def test_inference_by_hand(fitted) -> None:
    """One hop of all neighbours and three layers, in dense matrices.

    Each layer is D^-1/2 (A + I) D^-1/2 X W + b of the sample and its neighbours alone.
    """
    gnn, nodes, score = fitted
    tensors = {
        name.removeprefix("network.layers."): value.astype(np.float64)
        for name, value in gnn.state()[0].items()
    }
    distance, near = NeighbourIndex(nodes.embedding).search(
        nodes.embedding, 10, exclude=np.arange(150)
    )
    features = np.concatenate([np.eye(4)[nodes.label], nodes.embedding.astype(np.float64)], 1)
    expected = []
    for row in (70, 99, 149):
        members = np.r_[row, near[row]]
        a = np.eye(11)
        a[0, 1:] = np.exp(-distance[row] / 2)  # only the sample itself receives messages
        scale = 1 / np.sqrt(a.sum(1))
        a = scale[:, None] * a * scale
        x = features[members]
        for layer in range(3):
            x = a @ x @ tensors[f"{layer}.lin.weight"].T + tensors[f"{layer}.bias"]
            x = np.maximum(x, 0) if layer < 2 else x
        expected.append(x[0, 0] * score[:60].std() + score[:60].mean())
    np.testing.assert_allclose(gnn.predict_rows(np.array([70, 99, 149])), expected, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_layers_equal_gcnconv(training: bool, monkeypatch) -> None:
    """A batch of 3 nodes, 9 that receive messages, 20 in all.

    The values of the first layers at nodes that no output depends on are not compared.
    """
    monkeypatch.setattr(
        "raypipe.extrapolators.published.gnn._dropped", lambda x, training: torch.relu(x)
    )
    torch.manual_seed(0)
    net, x, weight = PublishedNet(7).train(training), torch.randn(20, 7), torch.rand(9, 4)
    near = torch.stack(
        [
            (row + 1 + torch.randperm(8 if row < 3 else 19)[:4]) % (9 if row < 3 else 20)
            for row in range(9)
        ]
    )
    edges = torch.stack([near.flatten(), torch.arange(9).repeat_interleave(4)])
    expected = x
    for layer in net.layers[:-1]:
        torch.nn.init.normal_(layer.bias)
        expected = torch.relu(layer(expected, edges, weight.flatten()))
    expected = net.layers[-1](expected, edges, weight.flatten())[:3, 0]
    expected_gradient = torch.autograd.grad(expected.sum(), list(net.parameters()))
    output = net(x, near, weight, 3)
    torch.testing.assert_close(output, expected)
    gradient = torch.autograd.grad(output.sum(), list(net.parameters()))
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_prediction_does_not_depend_on_its_batch(fitted) -> None:
    gnn, _, _ = fitted
    together = gnn.predict_rows(np.arange(150))
    for rows in ([5, 80], [149], np.random.default_rng(0).permutation(150)[:77]):
        np.testing.assert_array_equal(gnn.predict_rows(np.array(rows)), together[rows])


@pytest.mark.parametrize("k", [4, 15])
def test_training_subgraph(problem, settings, k: int) -> None:
    nodes, score = problem(150)
    gnn = GnnPublished(settings("gnn-published", epochs=1, neighbours=k), 4)
    gnn.fit_graph(nodes, np.arange(60), score[:60])
    distance, near = NeighbourIndex(nodes.embedding).search(
        nodes.embedding, k, exclude=np.arange(150)
    )
    batch = torch.tensor([3, 17, 90])
    x, sources, weight = gnn._subgraph(batch)
    row = {tuple(feature): place for place, feature in enumerate(nodes.embedding.tolist())}
    rows = np.array([row[tuple(feature)] for feature in x[:, 4:].tolist()])
    assert rows[:3].tolist() == [3, 17, 90] and len(set(rows.tolist())) == len(rows)
    received: dict[int, list[int]] = {}
    for target, theirs, weights in zip(rows, rows[sources].tolist(), weight.tolist()):
        received[int(target)] = theirs
        for source, w in zip(theirs, weights, strict=True):
            place = near[target].tolist().index(source)  # every edge is an edge of the graph
            assert w == pytest.approx(np.exp(-distance[target, place] / 2), rel=1e-5)
    assert all(
        len(set(sources)) == len(sources) == min(k, FAN_OUT) for sources in received.values()
    )
    first = {source for target in (3, 17, 90) for source in received[target]}
    # two hops: the batch and its neighbours receive messages, no other node does
    assert set(received) == first | {3, 17, 90}


def test_learns_from_scored_samples_only(fitted, settings) -> None:
    gnn, nodes, score = fitted
    again = GnnPublished(settings("gnn-published", epochs=3), 4)
    again.fit_graph(nodes, np.arange(60), score[:60])
    np.testing.assert_array_equal(
        gnn.predict_rows(np.arange(150)), again.predict_rows(np.arange(150))
    )
    other = GnnPublished(settings("gnn-published", epochs=3), 4)
    other.fit_graph(nodes, np.arange(60), score[:60][::-1])
    assert not np.array_equal(gnn.predict_rows(np.arange(150)), other.predict_rows(np.arange(150)))


def test_it_learns(problem, settings) -> None:
    nodes, score = problem(400, noise=0.0)
    # seed 0 draws 0.49; the mean of eight is 0.53
    gnn = GnnPublished(settings("gnn-published").model_copy(update={"seed": 2}), 4)
    # without standardisation a learning rate of 1e-3 would not reach such scores
    gnn.fit_graph(nodes, np.arange(200), score[:200] * 1e4)
    assert np.corrcoef(gnn.predict_rows(np.arange(200, 400)), score[200:])[0, 1] > 0.5


def test_round_trip_and_global_random_state(fitted, settings) -> None:
    gnn, nodes, score = fitted
    again = GnnPublished(settings("gnn-published"), 4)
    again.load_state(*gnn.state())
    with pytest.raises(RaypipeError, match="attach_graph"):
        again.predict_rows(np.arange(3))
    before = torch.get_rng_state()
    again.attach_graph(nodes)
    np.testing.assert_array_equal(
        gnn.predict_rows(np.arange(150)), again.predict_rows(np.arange(150))
    )
    again.fit_graph(nodes, np.arange(60), score[:60])
    assert torch.equal(before, torch.get_rng_state())


def test_degenerate_input(problem, settings) -> None:
    nodes, score = problem(60)
    unlabelled = Nodes(nodes.embedding, np.where(np.arange(60) % 2, nodes.label, -1), nodes.signals)
    gnn = GnnPublished(settings("gnn-published", epochs=2, neighbours=100), 4)
    gnn.fit_graph(unlabelled, np.arange(30), score[:30])
    assert np.isfinite(gnn.predict_rows(np.arange(60))).all()
    gnn.fit_graph(nodes, np.arange(30), np.full(30, 0.1))
    np.testing.assert_allclose(gnn.predict_rows(np.arange(60)), 0.1, rtol=1e-6)
    with pytest.raises(RaypipeError, match="19 measured samples are too few"):
        gnn.fit_graph(nodes, np.arange(19), score[:19])
    with pytest.raises(RaypipeError, match="1 of 30 scored rows are repeated"):
        gnn.fit_graph(nodes, np.r_[np.arange(29), 0], score[:30])
    with pytest.raises(RaypipeError, match="outside the graph of 60 samples"):
        gnn.predict_rows(np.array([60]))
    with pytest.raises(RaypipeError, match="fit_graph"):
        gnn.fit(nodes, score)
    with pytest.raises(RaypipeError, match="predict_rows"):
        gnn.predict(nodes)


def test_half_of_the_values_are_dropped_and_the_others_doubled() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 512, requires_grad=True)
    dropped = _dropped(x * 1.0, True)
    positive = x > 0
    survives = dropped != 0
    torch.testing.assert_close(dropped, torch.where(survives, 2 * x, 0.0))
    assert not survives[~positive].any()
    assert float(survives[positive].float().mean()) == pytest.approx(0.5, abs=0.01)
    left, right = survives[:, :-1] & positive[:, :-1], positive[:, 1:]
    both = float(survives[:, 1:][left & right].float().mean())
    assert both == pytest.approx(0.5, abs=0.01), "neighbouring values are drawn independently"
    (slope,) = torch.autograd.grad(dropped.sum(), x)
    torch.testing.assert_close(slope, survives * 2.0)
    torch.testing.assert_close(_dropped(x * 1.0, False), torch.relu(x))
