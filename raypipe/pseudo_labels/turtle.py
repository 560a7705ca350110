"""TURTLE, unsupervised transfer, in one feature space.

TURTLE looks for soft labels tau(x) = softmax(theta x) that a linear classifier learns easily. It
alternates: a fresh classifier w takes M steps of gradient descent on the cross-entropy with the
current labels, then theta takes one step on

    mean of the cross-entropy of softmax(w x) with tau(x)  -  gamma * entropy of the mean of tau

with w fixed (Eqs. 9 to 11; the first-order form of the authors' code). This finds labels of a large
margin. The entropy keeps them from collapsing into one label and makes the clusters about equal in
size. Adam and M are as in the authors' code; theta is weight-normalised.

References
----------
Gadetsky, Jiang and Brbić 2024, "Let Go of Your Labels with Unsupervised Transfer"
(arXiv 2406.07236).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from raypipe.pseudo_labels.clusters import Clusters, centred_directions, scaled_tensor
from raypipe.vision.optimizers import plain

INNER_STEPS, LR = 10, 1e-2
"""M, and the step size of both optimisers.

The step size is ten times that of the authors' code, which takes 6,000 steps on features of 1,000
and more numbers.
"""
MAX_BATCH = 10_000
"""Samples of one step, at most."""


def turtle(
    features: np.ndarray,
    clusters: int,
    *,
    steps: int,
    gamma: float,
    seed: int,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Clusters:
    """Return clusters of the features.

    Parameters
    ----------
    features : np.ndarray
        float32 [n, d].
    clusters : int
        Number of clusters.
    steps : int
        Steps of theta.
    gamma : float
        Weight of the entropy: the larger, the more equal the sizes of the clusters.
    seed : int
        Seed of the weights and the batches.
    step : callable
        Called with the steps done and their total.

    Raises
    ------
    StageError
        As `raypipe.pseudo_labels.clusters.kmeans`.
    """
    centre, points = centred_directions(features, clusters)
    all_points, random = scaled_tensor(points), np.random.default_rng(seed)
    width = points.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theta = weight_norm(nn.Linear(width, clusters))
        outer = plain(torch.optim.Adam)(theta.parameters(), LR)
        for number in range(steps):
            batch = all_points
            if len(points) > MAX_BATCH:
                rows = random.choice(len(points), MAX_BATCH, replace=False)
                batch = all_points[torch.from_numpy(rows)]
            soft_labels = theta(batch).softmax(1)
            logits = _briefly_trained_logits(batch, soft_labels.detach())
            mean = soft_labels.mean(0)
            entropy = -(mean * mean.clamp_min(1e-12).log()).sum()
            loss = F.cross_entropy(logits, soft_labels) - gamma * entropy
            outer.zero_grad()
            loss.backward()
            outer.step()
            step(number + 1, steps)
        weight, bias = theta.weight.detach().numpy(), theta.bias.detach().numpy()
    # the rule is for directions of length 1, which `scaled_tensor` scaled by sqrt(width)
    return Clusters(centre, weight * np.float32(np.sqrt(width)), bias.copy()).by_size(features)


def _briefly_trained_logits(batch: torch.Tensor, soft_labels: torch.Tensor) -> torch.Tensor:
    """Return the logits of a fresh classifier after `INNER_STEPS` steps on the labels."""
    classifier = nn.Linear(batch.shape[1], soft_labels.shape[1])
    inner = plain(torch.optim.Adam)(classifier.parameters(), LR)
    for _ in range(INNER_STEPS):
        loss = F.cross_entropy(classifier(batch), soft_labels)
        inner.zero_grad()
        loss.backward()
        inner.step()
    with torch.no_grad():
        return classifier(batch)
