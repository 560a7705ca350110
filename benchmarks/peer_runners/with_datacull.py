"""Selection with DataCull. Its `pruning_rate` is the fraction that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datacull.data import DCDataset
from datacull.methods.CCS import CCSDataLoader
from datacull.methods.TDDS import TDDSDataLoader
from torch.utils.data import TensorDataset

Arrays = dict[str, np.ndarray]


def _selected(
    arrays: Arrays, kind: Callable[..., Any], **options: object
) -> Callable[[], np.ndarray]:
    score = arrays["score"]
    dataset = DCDataset(TensorDataset(torch.zeros(len(score), 1)))

    def run() -> np.ndarray:
        loader = kind(dataset, pruning_rate=float(arrays["keep"]), **options)
        loader.resample(score)
        return loader.subset_indices

    return run


def top(arrays: Arrays) -> Callable[[], np.ndarray]:
    return _selected(arrays, TDDSDataLoader)


def ccs(arrays: Arrays) -> Callable[[], np.ndarray]:
    options = {"beta": float(arrays["cutoff"]), "num_strata": int(arrays["strata"])}
    return _selected(arrays, CCSDataLoader, descending=True, **options)
