"""Alignments with dattri's TracIn.

The vector is the gradient of the target function, which is linear in the parameters. Even with
`projector_kwargs=None` the attributor projects gradients to 512 dimensions, so the projection is
switched off afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from given import Given
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset


def tracin(given: Given, batch: int) -> Tensor:
    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        image, label = data
        logits = functional_call(given.network, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    def target(parameters: dict[str, Tensor], data: tuple[Tensor]) -> Tensor:
        return sum((value * given.vector[name]).sum() for name, value in parameters.items())

    task = AttributionTask(loss, given.network, given.network.state_dict(), target_func=target)
    attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None
    train = DataLoader(TensorDataset(given.images, given.labels), batch)
    return attributor.attribute(train, DataLoader(TensorDataset(torch.zeros(1, 1)), 1))[:, 0]
