"""TURTLE (Gadetsky, Jiang and Brbić 2024, "Let Go of Your Labels with Unsupervised Transfer", arXiv 2406.07236), in one feature space.

Soft labels tau(x) = softmax(theta x) are sought that a linear classifier learns easily. Alternately, a fresh classifier w takes M steps of
gradient descent on the cross-entropy with the labels as they are, and theta takes one step on

    mean of the cross-entropy of softmax(w x) with tau(x)  -  gamma * entropy of the mean of tau

with w held fixed (Eqs. 9 to 11; the first-order form of the authors' code): labels of a large margin are found, and the entropy keeps
them from being all the same, and makes them of about equal size. Adam and M as the authors' code has them; theta is weight-normalised.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from raypipe.pseudo_labels.clusters import Clusters, prepared, torch_points

INNER_STEPS, LR = 10, 1e-2
"""M, and the step size of both: ten times that of the authors' code, which takes 6,000 steps on features of 1,000 and more numbers."""
BATCH = 10_000
"""Most samples of one step."""


def turtle(
    features: np.ndarray,
    clusters: int,
    *,
    steps: int,
    gamma: float,
    seed: int,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Clusters:
    """Clusters of float32 [n, d] after so many steps of theta.

    gamma  weight of the entropy: the larger, the more equal the clusters
    step   called with steps done and in all
    Raises StageError as `raypipe.pseudo_labels.clusters.kmeans` does.
    """
    centre, points = prepared(features, clusters)
    everything, random = torch_points(points), np.random.default_rng(seed)
    width = points.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        labels = weight_norm(nn.Linear(width, clusters))
        outer = torch.optim.Adam(labels.parameters(), LR)
        for number in range(steps):
            if len(points) > BATCH:
                rows = random.choice(len(points), BATCH, replace=False)
                some = everything[torch.from_numpy(rows)]
            else:
                some = everything
            told = labels(some).softmax(1)
            said = _learnt(some, told.detach())
            mean = told.mean(0)
            entropy = -(mean * mean.clamp_min(1e-12).log()).sum()
            loss = F.cross_entropy(said, told) - gamma * entropy
            outer.zero_grad()
            loss.backward()
            outer.step()
            step(number + 1, steps)
        weight, bias = labels.weight.detach().numpy(), labels.bias.detach().numpy()
    # the rule is for directions of length 1
    return Clusters(centre, weight * np.float32(np.sqrt(width)), bias.copy()).by_size(features)


def _learnt(some: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """Logits of a classifier that has just begun to learn the labels."""
    classifier = nn.Linear(some.shape[1], told.shape[1])
    inner = torch.optim.Adam(classifier.parameters(), LR)
    for _ in range(INNER_STEPS):
        loss = F.cross_entropy(classifier(some), told)
        inner.zero_grad()
        loss.backward()
        inner.step()
    with torch.no_grad():
        return classifier(some)
