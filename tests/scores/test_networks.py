"""MoSo's alignments, GraNd and the self term of many kinds of networks, in float64.

They are compared with a plain loop over samples, one gradient each.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import TINY, as_trained, batch, tiny
from torch import Tensor, nn

from raypipe.proxies.networks import build_network
from raypipe.scores.forward_mode import Aligner
from raypipe.scores.moso import alignments, gradient_sum, leave_one_out
from raypipe.scores.per_sample import norms_and_alignments, slow_parameters

SAMPLES = 4
NOT_TRACED = "own, not traceable"
"""The network without a usable graph, which is differentiated as a whole."""


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """One gradient per sample over all trainable weights, [n, weights]."""
    weights = [value for value in model.parameters() if value.requires_grad]
    rows = []
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        parts = torch.autograd.grad(loss, weights, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def check(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Compare everything that is measured of each sample's gradient with the loop."""
    each = gradients(model, images, labels)
    mean, count = each.mean(0), len(each)
    expected, squares = each @ mean, each.square().sum(1)
    others = torch.stack([(each.sum(0) - g) / (count - 1) @ g for g in each])
    direction = {name: value / count for name, value in gradient_sum(model, images, labels).items()}

    def same(actual: Tensor, expected: Tensor) -> None:
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * scale)

    same(torch.cat([value.flatten() for value in direction.values()]), mean)
    same(alignments(model, direction, images, labels), expected)
    for channels_last in (False, True):
        same(Aligner(model, direction, channels_last=channels_last)(images, labels), expected)
    norms, dots = norms_and_alignments(model, images, labels, direction)
    same(norms, squares)
    same(dots, expected)
    without_self = leave_one_out(dots.numpy(), norms.numpy(), count)
    same(torch.from_numpy(without_self), others)


@pytest.mark.parametrize("name", TINY)
def test_agrees_with_a_loop_over_samples(name: str) -> None:
    model, (images, labels) = tiny(name), batch(SAMPLES, 16)
    check(model, images, labels)
    aligner = Aligner(model, gradient_sum(model, images, labels))
    aligner(images, labels)
    assert aligner.traced == (name != NOT_TRACED)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_networks_of_timm_agree_with_a_loop_over_samples(name: str) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(4)
    model = as_trained(build_network(f"timm:{name}", 5, 32)).double()
    check(model, *batch(SAMPLES, 32))


@pytest.mark.parametrize("part", ["backbone", "norm"])
def test_frozen_weights_do_not_count(part: str) -> None:
    check(tiny("own").hold(part, "full"), *batch(SAMPLES, 16))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_one_image_alone_has_the_same_values(name: str) -> None:
    model, (images, labels) = tiny(name), batch(SAMPLES, 16)
    direction = gradient_sum(model, images, labels)
    together = norms_and_alignments(model, images, labels, direction)
    for row in range(SAMPLES):
        alone = norms_and_alignments(model, images[row : row + 1], labels[row : row + 1], direction)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[row], rtol=1e-9, atol=1e-12)


def test_weights_that_only_a_slower_rule_covers_are_named() -> None:
    slow = slow_parameters(tiny("own"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert slow == [
        "backbone.attention.in_proj_weight",
        "backbone.attention.in_proj_bias",
        "backbone.attention.out_proj.weight",
        "backbone.attention.out_proj.bias",
        "backbone.gate.scale",
        "backbone.gate.mix.weight",
        "backbone.gate.mix.bias",
    ]
