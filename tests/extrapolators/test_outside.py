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


class Predicts(Broken):
    """Predicts what a test chooses."""

    returned: Any = None

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        pass

    def predict(self, nodes: Nodes) -> np.ndarray:
        return self.returned

    def difficulty(self, nodes: Nodes) -> np.ndarray:
        return np.ones(len(nodes), np.float32)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros((4, 1), np.float32), r"predict returned float32 of shape \[4, 1\]; expected fl"),
        (np.zeros(3, np.float32), r"predict returned float32 of shape \[3\]; .* shape \[4\]"),
        (np.zeros(4, np.int64), r"predict returned int64 of shape \[4\]"),
        ([0.0] * 4, r"predict returned list of shape \[4\]"),
        (None, r"predict returned NoneType of shape \[\]"),
        (np.array([0, 1, np.nan, 2], np.float32), "predict: 1 of 4 values are not finite"),
    ],
)
@pytest.mark.parametrize("method", ["predict", "predict_with_doubt"])
def test_wrong_predictions_name_the_extrapolator(
    monkeypatch: pytest.MonkeyPatch, method: str, returned: Any, message: str
) -> None:
    name = f"{__name__}:Predicts"
    with code_allowed():
        extrapolator = make(ExtrapolateSettings(method=name), 2)
    extrapolator.fit(NODES, np.zeros(4))
    monkeypatch.setattr(Predicts, "returned", np.arange(4, dtype=np.float32))
    assert np.array_equal(extrapolator.predict(NODES), np.arange(4))
    assert extrapolator.predict_with_doubt(NODES)[1].shape == (4, 4)
    monkeypatch.setattr(Predicts, "returned", returned)
    with pytest.raises(
        StageError, match=rf"^extrapolate.method: {name} failed \(ValueError: {message}"
    ):
        getattr(extrapolator, method)(NODES)


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
