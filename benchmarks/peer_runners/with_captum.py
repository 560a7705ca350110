"""Alignments with captum's TracInCP, which computes the vector from the query images.

With `sample_wise_grads_per_batch` it leaves out the layers that are neither linear nor
convolutions.
"""

from __future__ import annotations

from captum.influence import TracInCP
from given import Given
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def _influence(given: Given, batch: int, sample_wise: bool) -> Tensor:
    tracin = TracInCP(
        given.network,
        DataLoader(TensorDataset(given.images, given.labels), batch),
        ["in memory"],
        lambda network, checkpoint: 1.0,  # the weights are loaded already
        loss_fn=nn.CrossEntropyLoss(reduction="sum" if sample_wise else "none"),
        sample_wise_grads_per_batch=sample_wise,
    )
    return tracin.influence(given.queries, aggregate=True)[0]


def tracincp(given: Given, batch: int) -> Tensor:
    return _influence(given, batch, False)


def tracincp_sample_wise(given: Given, batch: int) -> Tensor:
    return _influence(given, batch, True)
