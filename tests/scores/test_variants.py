"""Variants of MoSo: leave-one-out, the published code's formula, last layer, BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypipe.proxies.networks import build_network
from raypipe.scores.calibration import recalibrate
from raypipe.scores.head import head_gradient_sum, head_norms_and_alignments
from raypipe.scores.moso import add_one_in, leave_one_out


def _gradients(count: int = 7, width: int = 5) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, (count, width)) + 0.3


def test_leave_one_out_is_the_mean_over_the_others() -> None:
    gradients = _gradients()
    mean = gradients.mean(0)
    aligned, squares = (gradients @ mean)[:, None], (gradients**2).sum(1)[:, None]
    expected = [np.delete(gradients, i, 0).mean(0) @ gradients[i] for i in range(7)]
    np.testing.assert_allclose(leave_one_out(aligned, squares, 7)[:, 0], expected, rtol=1e-12)


def test_formula_of_the_published_code() -> None:
    gradients = _gradients()
    n, mean = 7, gradients.mean(0)
    aligned, squares = (gradients @ mean)[:, None], (gradients**2).sum(1)[:, None]
    expected = [
        (2 * n - 3) / (n - 1) ** 2 * mean @ mean
        - g @ g / (n - 1) ** 2
        + (2 * n - 4) / (n - 1) ** 2 * ((mean - g / n) @ g)
        for g in gradients
    ]
    actual = leave_one_out(aligned, squares, n, "code", np.array([mean @ mean]))
    np.testing.assert_allclose(actual[:, 0], expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"requires mean_square, \|G\|\^2"):
        leave_one_out(aligned, squares, n, "code")


def test_a_sample_that_joins_is_scored_as_one_of_them() -> None:
    gradients = _gradients()
    n, mean, new = 6, gradients[:6].mean(0), gradients[6]
    everyone, square = gradients.mean(0), np.array([mean @ mean])
    aligned, squares = np.array([[new @ mean]]), np.array([[new @ new]])
    inside, mean_square = add_one_in(aligned, squares, n, square)
    assert inside[0, 0] == pytest.approx(everyone @ new) and mean_square[0, 0] == pytest.approx(
        everyone @ everyone
    )
    assert leave_one_out(inside, squares, n + 1)[0, 0] == pytest.approx(new @ mean)
    whole = leave_one_out(
        (gradients @ everyone)[:, None],
        (gradients**2).sum(1)[:, None],
        7,
        "code",
        np.array([everyone @ everyone]),
    )
    assert leave_one_out(inside, squares, n + 1, "code", mean_square)[0, 0] == pytest.approx(
        whole[6, 0]
    )


def test_last_layer_in_closed_form_agrees_with_differentiation() -> None:
    torch.manual_seed(0)
    model = build_network("small", 5, 16).double().eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (6,), generator=generator)
    head = [model.head.weight, model.head.bias]
    rows = [
        torch.autograd.grad(F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]), head)
        for i in range(6)
    ]
    total = head_gradient_sum(model, images, labels)
    torch.testing.assert_close(total["head.weight"], sum(row[0] for row in rows))
    torch.testing.assert_close(total["head.bias"], sum(row[1] for row in rows))
    squares, aligned = head_norms_and_alignments(model, images, labels, total)
    for i, (weight, bias) in enumerate(rows):
        torch.testing.assert_close(squares[i], weight.square().sum() + bias.square().sum())
        torch.testing.assert_close(
            aligned[i], (weight * total["head.weight"]).sum() + (bias * total["head.bias"]).sum()
        )


def test_recalibration_gives_the_statistics_of_the_data_and_leaves_weights_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.2), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5)
    )
    model[0].running_mean.fill_(50)
    batches = [torch.randn(8, 3, 4, 4) * 2 + 1 for _ in range(5)]
    before = {name: value.clone() for name, value in model.named_parameters()}
    recalibrate(model, batches)
    whole = torch.cat(batches)
    torch.testing.assert_close(model[0].running_mean, whole.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    average = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_var, average, rtol=1e-4, atol=1e-4)
    assert model[0].momentum == 0.2
    assert not any(module.training for module in model.modules())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])


def test_a_network_without_batchnorm_needs_no_batch_to_be_recalibrated() -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError("a batch was read")
        yield

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.LayerNorm(3))
    assert recalibrate(model.train(), batches()) is model and not model.training
