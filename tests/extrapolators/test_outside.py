"""Extrapolators from outside raypipe: their errors name them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from raypipe import plugins
from raypipe.config import ExtrapolateSettings
from raypipe.errors import ConfigError, StageError
from raypipe.extrapolators import make
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.plugins import EXTRAPOLATOR, code_allowed
from raypipe.progress import ProgressCallback

NODES = Nodes(np.zeros((4, 2), np.float32), np.zeros(4, np.int64), np.zeros((4, 3), np.float32))
NAME = f"{__name__}:Broken"


class Broken(Extrapolator):
    """Fails in every method."""

    summary = "fails"
    default_neighbours = 5

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        raise ValueError("in fit")

    def predict(self, nodes: Nodes) -> np.ndarray:
        raise ValueError("in predict")

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        raise ValueError("in state")

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        raise ValueError("in load_state")


@pytest.mark.parametrize(
    ("method", "arguments", "where"),
    [
        ("fit", (NODES, np.zeros(4)), "fit"),
        ("predict", (NODES,), "predict"),
        ("predict_with_doubt", (NODES,), "predict"),
        ("state", (), "state"),
        ("load_state", ({}, {}), "load_state"),
    ],
)
def test_errors_name_the_extrapolator(method: str, arguments: Any, where: str) -> None:
    with code_allowed():
        extrapolator = make(ExtrapolateSettings(method=NAME), 2)
    expected = rf"^extrapolate.method: {NAME} failed \(ValueError: in {where}, test_outside.py line"
    with pytest.raises(StageError, match=expected):
        getattr(extrapolator, method)(*arguments)


def test_an_entry_point_without_its_target_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (package,) = [item for item in importlib.metadata.distributions() if item.name == "pydantic"][
        :1
    ]
    point = importlib.metadata.EntryPoint("mine", f"{__name__}:Brokn", EXTRAPOLATOR.group)
    point = point._for(package)  # type: ignore[attr-defined]
    monkeypatch.setattr(plugins, "declared", lambda kind: {"mine": (point,)})
    expected = r"'Brokn'; did you mean 'Broken'\? \(entry point 'mine' of pydantic \d"
    with code_allowed(), pytest.raises(ConfigError, match=expected):
        plugins.find(EXTRAPOLATOR, "mine", Extrapolator)
