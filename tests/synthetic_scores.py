"""Synthetic samples and scores, shared by the tests of extrapolators and of their assessment."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from raypipe.config import ExtrapolateSettings
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.trees import OPTIONS

Problem = tuple[Nodes, np.ndarray]


def _problem(
    count: int = 400,
    classes: int = 4,
    width: int = 6,
    signals: int = 3,
    seed: int = 0,
    noise: float = 0.1,
) -> Problem:
    """Samples whose score depends on their embedding, differently for each class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count)
    embedding = (
        rng.normal(size=(classes, width))[label] * 0.7 + rng.normal(size=(count, width))
    ).astype(np.float32)
    slope = rng.normal(size=(classes, width))
    score = (
        np.tanh((embedding * slope[label]).sum(1))
        + 0.5 * slope[label, 0]
        + noise * rng.normal(size=count)
    )
    return Nodes(embedding, label, rng.normal(size=(count, signals))), score


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from more threads, and lose a lot on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def few_trees() -> Iterator[None]:
    """A few steps are enough for tiny problems."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIONS, "max_iter", 60)
        patch.setitem(OPTIONS, "learning_rate", 0.15)
        yield


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    return _problem


@pytest.fixture(scope="session")
def settings() -> Callable[..., ExtrapolateSettings]:
    return lambda method, **values: ExtrapolateSettings(method=method, **values)
