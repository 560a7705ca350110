from __future__ import annotations

import numpy as np
import torch

from raypipe.extrapolators.gat import (
    AnchorNet,
    Anchors,
    FixedDegreeGATv2,
    Queries,
    apply,
    encode,
    train,
)


def make(
    count: int = 60, k: int = 5, width: int = 7, classes: int = 3, seed: int = 0
) -> tuple[Queries, Anchors]:
    """Anchors as queries of each other, with random neighbours, never the sample itself."""
    g = torch.Generator().manual_seed(seed)
    feature, label = (
        torch.randn(count, width, generator=g),
        torch.randint(0, classes + 1, (count,), generator=g),
    )
    near = torch.stack(
        [(torch.randperm(count - 1, generator=g)[:k] + 1 + row) % count for row in range(count)]
    )
    anchors = Anchors(feature, label, torch.randn(count, generator=g))
    return Queries(feature, label, near, torch.rand(count, k, generator=g)), anchors


def test_layer_equals_gatv2conv() -> None:
    from torch_geometric.nn import GATv2Conv  # three seconds, which no other test file needs

    n, k, hidden, heads = 6, 5, 8, 2
    torch.manual_seed(0)
    layer = FixedDegreeGATv2(hidden, heads, 1)
    torch.nn.init.normal_(layer.bias)
    reference = GATv2Conv(
        (hidden, hidden), hidden // heads, heads=heads, edge_dim=1, add_self_loops=False
    )
    reference.load_state_dict(
        {
            "att": layer.attention[None],
            "bias": layer.bias,
            "lin_l.weight": layer.source.weight,
            "lin_l.bias": layer.source.bias,
            "lin_r.weight": layer.target.weight,
            "lin_r.bias": layer.target.bias,
            "lin_edge.weight": layer.edge.weight,
        }
    )
    neighbour, query, edge = torch.randn(n, k, hidden), torch.randn(n, hidden), torch.rand(n, k, 1)
    edges = torch.stack([torch.arange(n * k), torch.arange(n).repeat_interleave(k)])
    expected = reference((neighbour.flatten(0, 1), query), edges, edge.flatten(0, 1))
    torch.testing.assert_close(layer(neighbour, query, edge), expected)


def test_own_score_is_not_an_input() -> None:
    queries, anchors = make()
    net = AnchorNet(7, 3)
    scored = anchors.score.clone().requires_grad_()
    out = net.eval()(queries, Anchors(anchors.feature, anchors.label, scored))
    for row in (0, 31, 59):
        gradient = torch.autograd.grad(out[row], scored, retain_graph=True)[0]
        assert gradient[row] == 0 and (gradient[queries.neighbour[row]] != 0).all()
        assert (gradient != 0).sum() == 5


def test_encoding_ahead_changes_nothing_nor_does_the_batch() -> None:
    queries, anchors = make()
    net = AnchorNet(7, 3).eval()
    with torch.no_grad():
        torch.testing.assert_close(apply(net, queries, anchors), net(queries, anchors))
        torch.testing.assert_close(
            apply(net, queries, anchors, encode(net, anchors)), apply(net, queries, anchors)
        )
        torch.testing.assert_close(
            net(queries.take(slice(7, 9)), anchors), net(queries, anchors)[7:9]
        )
    assert len(apply(net, queries.take(slice(0, 0)), anchors)) == 0


def test_unlabelled_samples_have_no_class() -> None:
    queries, anchors = make()
    net = AnchorNet(7, 3).eval()
    assert (net.query_class.weight[0] == 0).all() and (net.anchor_class.weight[0] == 0).all()
    unlabelled_queries = Queries(
        queries.feature, torch.zeros(60, dtype=torch.long), queries.neighbour, queries.distance
    )
    unlabelled_anchors = Anchors(anchors.feature, torch.zeros(60, dtype=torch.long), anchors.score)
    with torch.no_grad():
        before = net(unlabelled_queries, unlabelled_anchors)
        # the weight of "same class": two missing labels are not the same class
        net.told.weight[:, 1] = 5.0
        torch.testing.assert_close(net(unlabelled_queries, unlabelled_anchors), before)
        assert not torch.allclose(
            net(queries, anchors), AnchorNet.forward(net, unlabelled_queries, unlabelled_anchors)
        )


def test_training_reaches_its_target_and_repeats_itself() -> None:
    queries, anchors = make(count=200)
    # attention must find the score of the nearest neighbour of the same class
    target = torch.where(
        (anchors.label > 0), anchors.feature[:, 0] + anchors.label.float(), torch.tensor(0.0)
    )
    anchors = Anchors(anchors.feature, anchors.label, (target - target.mean()) / target.std())
    epochs = []
    state = torch.get_rng_state()
    first = train(queries, anchors, torch.arange(160), 3, 12, 16, 5, lambda: epochs.append(1))
    assert torch.equal(state, torch.get_rng_state()) and len(epochs) == 12
    torch.rand(10)
    second = train(queries, anchors, torch.arange(160), 3, 12, 16, 5, lambda: None)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values())
    )
    held = queries.take(slice(160, 200))
    assert np.corrcoef(apply(first, held, anchors), anchors.score[160:])[0, 1] > 0.8
    train(queries, anchors, torch.arange(5), 3, 1, 16, 5, lambda: None)  # one step in all
