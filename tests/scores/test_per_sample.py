"""Gradient norms and alignments layer by layer against one gradient per sample, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import as_trained, batch
from torch import Tensor, nn

from raypipe.proxies.networks import build_network
from raypipe.scores.per_sample import norms_and_alignments, slow_parameters


class _Scaled(nn.Module):
    """A bare parameter that belongs to no standard layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7, 1.3, 0.9]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(1, 3, 1, 1)


class _Twice(nn.Module):
    """A layer that runs twice, and an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.end = nn.Linear(3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(F.relu_(self.layer(F.relu_(self.layer(x)))).flatten(1))


class _Sequence(nn.Module):
    """Tokens, positions and layer norms, as in a transformer without its attention."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.back = nn.Linear(6, 16, bias=False)
        if shared:
            self.back.weight = self.embedding.weight
        self.end = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :10].abs() * 5).long() % 16
        return self.end(self.back(self.norm(F.gelu(self.mix(self.embedding(tokens))))).mean(1))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=True),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False),
        nn.GroupNorm(2, 8),
        nn.SiLU(inplace=True),
        nn.Conv2d(8, 20, 1, stride=2),
        nn.BatchNorm2d(20, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 4),
    )


NETWORKS = {
    "convolutions": (_convolutions, []),
    "sequence": (_Sequence, []),
    "shared weight": (lambda: _Sequence(shared=True), ["embedding.weight"]),
    "unknown parameter": (
        lambda: nn.Sequential(_Scaled(), nn.Flatten(), nn.Linear(192, 4)),
        ["0.scale"],
    ),
    "prelu": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Flatten(), nn.Linear(144, 4)),
        ["1.weight"],
    ),
    "layer that runs twice": (_Twice, ["layer.weight", "layer.bias"]),
    "reflecting convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(256, 4)
        ),
        ["0.weight", "0.bias"],
    ),
}


def _loop(model: nn.Module, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    rows = []
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        rows.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(named.items(), gradients, strict=True)
            }
        )
    return rows


def _check(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in model.named_parameters()
    }
    rows = _loop(model, images, labels)
    squares = torch.stack(
        [sum((g.square().sum() for g in row.values()), torch.zeros(())) for row in rows]
    )
    dots = torch.stack([sum((row[name] * direction[name]).sum() for name in row) for row in rows])
    actual_squares, actual_dots = norms_and_alignments(model, images, labels, direction)
    torch.testing.assert_close(
        actual_squares, squares.to(actual_squares.dtype), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(actual_dots, dots, rtol=1e-9, atol=1e-10)
    alone, zero = norms_and_alignments(model, images, labels)
    torch.testing.assert_close(alone, actual_squares)
    assert zero.abs().max() == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_a_loop_over_samples(name: str) -> None:
    make, slow = NETWORKS[name]
    torch.manual_seed(11)
    model = as_trained(make().double())
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    assert slow_parameters(model, images[:1]) == slow
    _check(model, images, torch.randint(0, 4, (5,), generator=generator))


@pytest.mark.parametrize(
    ("name", "size"), [("small", 16), ("resnet18", 32), ("resnext50_32x4d", 32)]
)
def test_agrees_on_the_proxies(name: str, size: int) -> None:
    torch.manual_seed(1)
    model = as_trained(build_network(name, 4, size).double())
    images, labels = batch(2, size, classes=4, seed=2)
    _check(model, images, labels)
    assert slow_parameters(model, images[:1]) == []


def test_frozen_parameters_do_not_count() -> None:
    torch.manual_seed(1)
    model = as_trained(_convolutions().double())
    model[0].weight.requires_grad_(False)
    model[-1].bias.requires_grad_(False)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    _check(model, images, torch.tensor([0, 1, 2, 3]))
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad


def test_no_samples_have_no_gradients() -> None:
    model, images = build_network("small", 4, 8), torch.zeros((0, 3, 8, 8), dtype=torch.uint8)
    square, aligned = norms_and_alignments(model, images, torch.zeros(0, dtype=torch.int64))
    assert square.shape == aligned.shape == (0,)
