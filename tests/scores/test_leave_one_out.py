"""MoSo against what it approximates: retraining a convex model without each sample.

The approximation uses the mean gradient of every step in place of that of the end. After a few
steps it ranks samples almost like leave-one-out, and less well the longer the training. The tests
check both.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from raypipe.scores.moso import combine, leave_one_out
from raypipe.scores.per_sample import norms_and_alignments

SAMPLES, FEATURES, CLASSES, RATE = 60, 8, 3, 0.05


def _data(seed: int) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(seed)
    centres = random.normal(0, 1, (CLASSES, FEATURES))
    labels = random.integers(0, CLASSES, SAMPLES)
    inputs = centres[labels] + random.normal(0, 1.2, (SAMPLES, FEATURES))
    labels[:6] = (labels[:6] + 1) % CLASSES  # some wrong labels
    return torch.tensor(inputs), torch.tensor(labels)


def _train(inputs: Tensor, labels: Tensor, keep: list[int], steps: int) -> list[nn.Module]:
    """Return the model before every step of gradient descent on the samples `keep`, and after."""
    model = nn.Linear(FEATURES, CLASSES).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    path = []
    for _ in range(steps):
        path.append({name: value.clone() for name, value in model.state_dict().items()})
        gradients = torch.autograd.grad(
            F.cross_entropy(model(inputs[keep]), labels[keep]), list(model.parameters())
        )
        with torch.no_grad():
            for value, gradient in zip(model.parameters(), gradients, strict=True):
                value -= RATE * gradient
    path.append(model.state_dict())
    models = []
    for state in path:
        copy = nn.Linear(FEATURES, CLASSES).double()
        copy.load_state_dict(state)
        models.append(copy)
    return models


def _correlations(seed: int, steps: int) -> tuple[float, float, float]:
    """Return Spearman with leave-one-out, with and without the self term, and the slope.

    The slope is that of the scores over the true changes of the loss.
    """
    inputs, labels = _data(seed)
    everything = list(range(SAMPLES))
    path = _train(inputs, labels, everything, steps)
    truth = []
    for left_out in everything:
        keep = [index for index in everything if index != left_out]
        without = _train(inputs, labels, keep, steps)[-1]
        with torch.no_grad():
            losses = [
                F.cross_entropy(model(inputs[keep]), labels[keep]).item()
                for model in (without, path[-1])
            ]
        truth.append(losses[0] - losses[1])
    columns, squares = [], []
    for model in path[:-1]:
        gradients = torch.autograd.grad(
            F.cross_entropy(model(inputs), labels), list(model.parameters())
        )
        square, aligned = norms_and_alignments(
            model, inputs, labels, dict(zip(["weight", "bias"], gradients, strict=True))
        )
        columns.append(aligned.numpy())
        squares.append(square.numpy())
    aligned, square = np.stack(columns, 1), np.stack(squares, 1)
    rates = np.full(steps, RATE)
    score = combine(
        leave_one_out(aligned, square, SAMPLES), rates, "lr", steps=steps, samples=SAMPLES
    )
    plain = combine(aligned, rates, "lr", steps=steps, samples=SAMPLES)
    return (
        spearmanr(score, truth).statistic,
        spearmanr(plain, truth).statistic,
        np.polyfit(truth, score, 1)[0],
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_samples_as_training_without_each_of_them_does(seed: int) -> None:
    with_self_term, without, slope = _correlations(seed, steps=5)
    print(f"5 steps: Spearman {with_self_term:.3f}, without the self term {without:.3f}")
    assert with_self_term > 0.9
    assert 0.7 < slope < 2, "the score is a change of the loss, not only an order"


def test_says_less_the_longer_the_training() -> None:
    early, late = _correlations(0, steps=5), _correlations(0, steps=40)
    print(f"5 steps {early[0]:.3f}, 40 steps {late[0]:.3f}, without the self term {late[1]:.3f}")
    assert 0.5 < late[0] < early[0]
    assert late[0] > late[1], "the self term matters in so small a set"
