"""Adversarial examples against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import as_trained, batch
from torch import Tensor, nn

from raypipe.config import AdversarySettings
from raypipe.proxies.networks import ProxyNet, build_network
from raypipe.vision.adversarial import attack, starting_points

FIVE = AdversarySettings(eps=8 / 255, step_size=3 / 255, iterations=5)


@pytest.fixture(scope="module")
def model() -> ProxyNet:
    torch.manual_seed(0)
    network = build_network("small", 5, 8, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    as_trained(network)
    with torch.no_grad():
        network.head.weight.mul_(30)  # a fresh network predicts nearly the same for every image
    return network


def _loss(model: nn.Module, pixels: Tensor, label: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(pixels), label, reduction="none")


def _by_hand(
    model: nn.Module, pixels: Tensor, label: Tensor, settings: AdversarySettings, start: np.ndarray
) -> Tensor:
    """The paper's iteration, on pixels from 0 to 1, image by image."""
    examples = []
    for image, y, begin in zip(
        pixels.double() / 255, label, torch.from_numpy(start).double(), strict=True
    ):
        x = (image + (begin / 127.5 - 1) * settings.eps).clamp(0, 1)
        for _ in range(settings.iterations):
            x = x.float().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(255 * x[None]), y[None]), x)
            x = (x + settings.step_size * slope.sign()).detach().double()
            x = torch.minimum(torch.maximum(x, image - settings.eps), image + settings.eps).clamp(
                0, 1
            )
        examples.append(x)
    return 255 * torch.stack(examples)


@pytest.mark.parametrize("random", [False, True])
def test_it_stays_in_the_ball_and_in_the_image_and_raises_the_loss(
    model: ProxyNet, random: bool
) -> None:
    pixels, label = batch(32, 8)
    pixels[0], pixels[1] = 0, 255  # where the range of pixels cuts the ball
    start = starting_points(pixels.shape, 3) if random else None
    actual = attack(model, pixels, label, FIVE, start)
    assert actual.dtype == torch.float32 and not actual.requires_grad
    assert (actual - pixels).abs().max() <= 8 + 1e-4 and actual.min() >= 0 and actual.max() <= 255
    assert (actual - pixels).abs().max() > 7.9
    before, after = _loss(model, pixels, label), _loss(model, actual, label)
    assert (after >= before - 1e-5).float().mean() > 0.95 and after.mean() > before.mean() + 0.1


def test_it_is_the_iteration_of_the_paper(model: ProxyNet) -> None:
    pixels, label = batch(4, 8)
    start = starting_points(pixels.shape, 1, 2)
    actual, expected = (
        attack(model, pixels, label, FIVE, start),
        _by_hand(model, pixels, label, FIVE, start),
    )
    # the sign of a gradient near 0 depends on rounding
    assert ((actual - expected).abs() < 0.01).float().mean() > 0.99


def test_more_iterations_and_a_larger_ball_find_worse(model: ProxyNet) -> None:
    pixels, label = batch(32, 8)
    losses = [
        _loss(model, attack(model, pixels, label, FIVE.model_copy(update=change)), label)
        .mean()
        .item()
        for change in ({"iterations": 1}, {}, {"eps": 16 / 255, "iterations": 10})
    ]
    assert losses == sorted(losses) and losses[0] < losses[1] < losses[2]


def test_an_example_depends_on_no_other_of_its_batch_and_on_no_second_call(model: ProxyNet) -> None:
    pixels, label = batch(12, 8)
    start = starting_points(pixels.shape, 7)
    whole = attack(model, pixels, label, FIVE, start)
    assert torch.equal(whole, attack(model, pixels, label, FIVE, start))
    rows = slice(1, None, 3)  # the part of the second of three workers
    part = attack(model, pixels[rows], label[rows], FIVE, start[rows])
    assert ((part - whole[rows]).abs() < 0.01).float().mean() > 0.99
    assert not torch.equal(
        whole, attack(model, pixels, label, FIVE, starting_points(pixels.shape, 8))
    )


def test_the_network_is_attacked_in_eval_mode_and_left_as_it_was(model: ProxyNet) -> None:
    pixels, label = batch(12, 8)
    expected = attack(model, pixels, label, FIVE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    try:
        with torch.no_grad():
            assert torch.equal(attack(model, pixels, label, FIVE), expected)
        assert model.training and model.backbone[1].training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    finally:
        model.head.weight.grad = None
        model.eval()


def test_where_the_pixels_are_normalised_makes_no_difference(model: ProxyNet) -> None:
    pixels, label = batch(12, 8)
    outside = nn.Sequential(model.backbone, model.head)

    def normalised(pixels: Tensor) -> Tensor:
        return outside((pixels / 255 - model.mean) / model.std)

    assert torch.equal(attack(normalised, pixels, label, FIVE), attack(model, pixels, label, FIVE))


def test_in_bfloat16_bounds_hold_and_the_loss_rises(model: ProxyNet) -> None:
    pixels, label = batch(32, 8)
    actual = attack(model, pixels, label, FIVE, starting_points(pixels.shape, 3), bfloat16=True)
    assert actual.dtype == torch.float32
    assert (actual - pixels).abs().max() <= 8 + 1e-4 and actual.min() >= 0 and actual.max() <= 255
    assert _loss(model, actual, label).mean() > _loss(model, pixels, label).mean() + 0.1


def test_attacks_begin_anywhere_in_the_ball() -> None:
    start = starting_points((64, 3, 8, 8), 5, 1)
    assert (
        start.dtype == np.uint8
        and (start.min(), start.max()) == (0, 255)
        and abs(start.mean() - 127.5) < 2
    )
    assert np.array_equal(start, starting_points((64, 3, 8, 8), 5, 1))
    assert not np.array_equal(start, starting_points((64, 3, 8, 8), 5, 2))
