"""Alignments with kronfluence: pairwise scores with identity factors, query gradients added up.

It computes the vector from the query images, and leaves out the layers that are neither linear nor
convolutions.
"""

from __future__ import annotations

import tempfile

import torch.nn.functional as F
from given import Given
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Classification(Task):
    def compute_train_loss(
        self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def identity(given: Given, batch: int) -> Tensor:
    train = TensorDataset(given.images, given.labels)
    query = TensorDataset(*given.queries)
    network = prepare_model(given.network, Classification())
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "peers", network, Classification(), cpu=True, disable_tqdm=True, output_dir=folder
        )
        factors = FactorArguments(strategy="identity")
        analyzer.fit_all_factors("identity", train, batch, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores",
            "identity",
            query,
            train,
            per_device_query_batch_size=len(query),
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(aggregate_query_gradients=True),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"][0]
