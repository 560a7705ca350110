"""The rules by hand for layers of a tensor with a derivative, against `torch.func.jvp`."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from networks import batch
from torch import Tensor, nn
from torch.func import functional_call

from raypipe.scores import forward_mode
from raypipe.scores.dual_tensors import Dual, differentiate
from raypipe.scores.forward_mode import Aligner
from raypipe.scores.forward_rules import rule_of
from raypipe.scores.moso import alignments, gradient_sum


def _without_bias(layer: nn.Module) -> nn.Module:
    """As `bias=False` makes it, which older versions of PyTorch lack."""
    layer.register_parameter("bias", None)
    return layer


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear of tokens": (nn.Linear(6, 4, bias=False), (5, 3, 6)),
    "batch norm": (nn.BatchNorm2d(6), (5, 6, 4, 3)),
    "batch norm of vectors": (nn.BatchNorm1d(6), (5, 6)),
    "batch norm without weights": (nn.BatchNorm2d(6, affine=False), (5, 6, 4, 3)),
    "batch norm without bias": (_without_bias(nn.BatchNorm2d(6)), (5, 6, 4, 3)),
    "layer norm": (nn.LayerNorm(6), (5, 3, 6)),
    "layer norm of two axes": (nn.LayerNorm((3, 6)), (5, 3, 6)),
    "layer norm without bias": (nn.LayerNorm(6, bias=False), (5, 6)),
    "layer norm without weights": (nn.LayerNorm(6, elementwise_affine=False), (5, 3, 6)),
    "group norm": (nn.GroupNorm(3, 6), (5, 6, 4, 3)),
    "group norm of vectors": (nn.GroupNorm(2, 6), (5, 6)),
    "group norm without bias": (_without_bias(nn.GroupNorm(3, 6)), (5, 6, 4, 3)),
    "group norm without weights": (nn.GroupNorm(3, 6, affine=False), (5, 6, 4)),
}


@pytest.mark.parametrize(
    ("name", "channels_last", "with_derivative"),
    [
        (name, last, derived)
        for name, last, derived in product(LAYERS, (False, True), (False, True))
        if (len(LAYERS[name][1]) == 4 or not last) and (derived or "without weights" not in name)
    ],
)
def test_a_rule_agrees_with_jvp(name: str, channels_last: bool, with_derivative: bool) -> None:
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(4)

    def normal(like: Tensor | torch.Size) -> Tensor:
        size = like if isinstance(like, torch.Size) else like.shape
        return torch.randn(size, generator=generator, dtype=torch.float64)

    layer = layer.double().eval()
    with torch.no_grad():
        for value in (*layer.parameters(), *layer.buffers()):
            if value.is_floating_point():
                value.copy_(normal(value).abs() + 0.1)
        x = normal(torch.Size(shape)) + 2
        tangent = normal(x)
        if channels_last:
            x, tangent = (value.to(memory_format=torch.channels_last) for value in (x, tangent))
        given = Dual(x, tangent) if with_derivative else x
        weights = {key: value.detach() for key, value in layer.named_parameters()}
        along = {key: normal(value) for key, value in weights.items()}
        expected = differentiate(
            lambda own, inputs: functional_call(layer, own, (inputs,)), (given,), {}, weights, along
        )
        rule = rule_of(layer)
        assert rule is not None
        before = x.clone()
        actual = rule(layer, given, along)
    torch.testing.assert_close(actual.value, expected.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.tangent, expected.tangent, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, before), "another layer may read it"
    if name != "linear of tokens":
        assert actual.tangent.stride() == actual.value.stride() == expected.value.stride()
    if with_derivative:  # a view in another order of axes, as of a permuted tensor
        views = [value.transpose(0, -1).contiguous().transpose(0, -1) for value in (x, tangent)]
        assert not views[0].is_contiguous()
        with torch.no_grad():
            actual = rule(layer, Dual(*views), along)
        torch.testing.assert_close(actual.tangent, expected.tangent, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(actual.value, expected.value, rtol=1e-12, atol=1e-12)


class Own(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def _doubled(layer: nn.Module, given: object, result: Tensor) -> Tensor:
    return 2 * result


@pytest.mark.parametrize("case", ["subclass", "hook", "statistics of the batch", "autocast"])
def test_what_a_rule_does_not_know_is_left_to_jvp(case: str) -> None:
    torch.manual_seed(2)
    first = Own(12, 8) if case == "subclass" else nn.Linear(12, 8)
    norm = nn.BatchNorm1d(8, track_running_stats=case != "statistics of the batch")
    if case == "hook":
        first.register_forward_hook(_doubled)
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), first, norm, nn.ReLU(), nn.Linear(8, 5))
    model = model.eval() if case == "autocast" else model.eval().double()
    images, labels = batch(5, 16)
    images = images.to(model[-1].weight.dtype) / 255
    direction = gradient_sum(model, images, labels)
    expected = alignments(model, direction, images, labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        aligner = Aligner(model, direction)
        actual = aligner(images, labels)
        assert aligner.traced
    tolerance = 3e-2 if case == "autocast" else 1e-9
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


def test_a_network_runs_through_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    def differentiated(*arguments: object, **named: object) -> object:
        raise AssertionError("every layer here has a rule")

    monkeypatch.setattr(forward_mode, "differentiate", differentiated)
    model = nn.Sequential(nn.Conv2d(3, 6, 2), nn.GroupNorm(2, 6), nn.ReLU(), nn.Identity())
    model.extend([nn.LayerNorm(15), nn.BatchNorm2d(6), nn.Linear(15, 5)])
    images = batch(3, 16)[0].float()
    direction = {key: torch.ones_like(value) for key, value in model.named_parameters()}
    result = Aligner(model, direction)._run_graph(images)
    assert result is not None and result[1].std() > 0
