"""Alignments with traker: its gradient computer, and a projection to one dimension, the vector.

The scores of TRAK itself are another quantity. Features are divided by the square root of the
number of parameters; this is undone.
"""

from __future__ import annotations

import logging
import tempfile

import torch
import torch.nn.functional as F
from given import Given
from torch import Tensor, nn
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import AbstractProjector
from trak.utils import vectorize


class Loss(AbstractModelOutput):
    def __init__(self) -> None:
        pass

    @staticmethod
    def get_output(
        model: nn.Module,
        weights: dict[str, Tensor],
        buffers: dict[str, Tensor],
        image: Tensor,
        label: Tensor,
    ) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: object, buffers: object, batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        return torch.ones(len(batch[0]), 1)


class OntoVector(AbstractProjector):
    def __init__(self, vector: Tensor) -> None:
        super().__init__(len(vector), 1, 0, "vector", "cpu")
        self._vector = vector

    def project(self, grads: dict[str, Tensor], model_id: int) -> Tensor:
        return vectorize(grads, device="cpu") @ self._vector[:, None]


def featurize(given: Given, batch: int) -> Tensor:
    names = [name for name, _ in given.network.named_parameters()]
    vector = torch.cat([given.vector[name].flatten() for name in names])
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            given.network,
            Loss(),
            len(given.images),
            folder,
            device="cpu",
            projector=OntoVector(vector),
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        traker.load_checkpoint(given.network.state_dict(), model_id=0)
        for images, labels in zip(
            given.images.split(batch), given.labels.split(batch), strict=True
        ):
            traker.featurize((images, labels), num_samples=len(images))
        features = torch.tensor(traker.saver.current_store["grads"][:, 0])
        return features * traker.normalize_factor
