"""MoSo by forward mode against a plain loop over samples, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import as_trained, batch
from torch import Tensor, nn

from raypipe.proxies.networks import build_network
from raypipe.scores.moso import alignments, combine, gradient_sum


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 8 * 8, 20), nn.Tanh(), nn.Linear(20, 5)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.to(self.layers[1].weight.dtype) / 255)


def _network(name: str, size: int) -> nn.Module:
    torch.manual_seed(3)
    model = Mlp() if name == "mlp" else build_network(name, 5, size)
    model = model.double()
    return as_trained(model)


def _loop(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return one gradient per sample, as in the definition, [n, parameters]."""
    rows = []
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        rows.append(
            torch.cat(
                [value.flatten() for value in torch.autograd.grad(loss, list(model.parameters()))]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "size"), [("mlp", 8), ("small", 16), ("resnet18", 32), ("resnet50", 32)]
)
def test_agrees_with_a_loop_over_samples(name: str, size: int) -> None:
    model = _network(name, size)
    count = 3 if name == "resnet50" else 6  # a gradient takes 200 MB
    images, labels = batch(count, size)
    gradients = _loop(model, images, labels)
    mean = gradients.mean(0)
    expected = gradients @ mean

    total = gradient_sum(model, images[:2], labels[:2])
    for key, value in gradient_sum(model, images[2:], labels[2:]).items():
        total[key] = total[key] + value
    direction = {key: value / count for key, value in total.items()}
    torch.testing.assert_close(
        torch.cat([value.flatten() for value in direction.values()]), mean, rtol=1e-9, atol=1e-12
    )
    actual = torch.cat(
        [
            alignments(model, direction, images[:-1], labels[:-1]),
            alignments(model, direction, images[-1:], labels[-1:]),
        ]
    )
    assert ((actual - expected).abs() / expected.abs().max()).max() < 1e-5
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


def test_float32_agrees_with_float64() -> None:
    model, (images, labels) = _network("small", 16), batch(8, 16)
    direction = {key: value / 8 for key, value in gradient_sum(model, images, labels).items()}
    exact = alignments(model, direction, images, labels)
    single = alignments(
        model.float(), {key: value.float() for key, value in direction.items()}, images, labels
    )
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 1e-4 * exact.abs().max()


def test_batch_size_does_not_matter() -> None:
    model, (images, labels) = _network("resnet18", 32), batch(7, 32)
    direction = {key: value / 7 for key, value in gradient_sum(model, images, labels).items()}
    whole = alignments(model, direction, images, labels)
    single = torch.cat(
        [alignments(model, direction, images[i : i + 1], labels[i : i + 1]) for i in range(7)]
    )
    torch.testing.assert_close(whole, single, rtol=1e-9, atol=1e-12)


def test_scoring_leaves_batchnorm_and_weights_alone() -> None:
    model, (images, labels) = _network("small", 16), batch(4, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    direction = gradient_sum(model.train(), images, labels)
    alignments(model.train(), direction, images, labels)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_no_gradient_gives_zero_and_a_broken_one_an_error() -> None:
    model, (images, labels) = _network("mlp", 8), batch(3, 8)
    zero = {
        key: torch.zeros_like(value) for key, value in gradient_sum(model, images, labels).items()
    }
    assert alignments(model, zero, images, labels).tolist() == [0, 0, 0]
    broken = {key: torch.full_like(value, torch.nan) for key, value in zero.items()}
    with pytest.raises(FloatingPointError, match="not finite"):
        alignments(model, broken, images, labels)


def test_combine_is_equation_4() -> None:
    aligned = np.array([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]])
    rates = np.array([0.1, 0.01])
    expected = [(500 / 3) * (0.1 * a + 0.01 * b) / 2 for a, b in aligned]
    np.testing.assert_allclose(
        combine(aligned, rates, "lr", steps=500, samples=3), expected, rtol=1e-6
    )
    np.testing.assert_allclose(
        combine(aligned, rates, "none", steps=500, samples=3), aligned.mean(1) * 500 / 3, rtol=1e-6
    )


def test_late_weights_take_the_second_half_of_the_checkpoints() -> None:
    aligned = np.array([[9.0, 100.0, 1.0], [-9.0, -100.0, 2.0], [0.0, 0.0, -3.0]])
    spread, rates = aligned.std(0), np.full(3, 0.1)
    late = combine(aligned, rates, "late", steps=5, samples=3, spread=spread)
    np.testing.assert_allclose(late, (aligned / spread)[:, 1:].mean(1), rtol=1e-6)
    only = combine(aligned[:, :1], rates[:1], "late", steps=5, samples=3, spread=spread[:1])
    np.testing.assert_allclose(only, aligned[:, 0] / spread[0], rtol=1e-6)


def test_normalized_weights_let_no_checkpoint_decide_alone() -> None:
    aligned = np.array([[100.0, 1.0], [-100.0, 2.0], [0.0, -3.0]])
    spread = aligned.std(0)
    actual = combine(aligned, np.array([0.1, 0.1]), "normalized", steps=5, samples=3, spread=spread)
    np.testing.assert_allclose(actual, (aligned / spread).mean(1), rtol=1e-6)
    # a checkpoint at which all alignments are equal contributes nothing, without a division by 0
    flat = combine(
        np.ones((3, 1)), np.array([0.1]), "normalized", steps=5, samples=3, spread=np.zeros(1)
    )
    assert flat.tolist() == [0, 0, 0]
