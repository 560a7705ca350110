"""`raypipe.testing.check_extrapolator` accepts sound ones and names what is broken in others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import Field

from raypipe.config.base import Settings
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.progress import ProgressCallback
from raypipe.testing import ContractError, check_extrapolator


class Nearest(Extrapolator):
    """The mean score of the nearest measured samples."""

    class Options(Settings):
        power: float = Field(1.0, gt=0, description="Exponent of the distance.")

    summary = "mean score of the nearest samples"
    default_neighbours = 5

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        self._score = self._check_fit(seed, score)
        self._build_index(seed.embedding)

    def predict(self, nodes: Nodes) -> np.ndarray:
        found = self._nearest(nodes)
        weight = 1 / (1e-6 + found.distance**self.options.power)
        values = (self._score[found.row] * weight).sum(1) / weight.sum(1)
        return values.astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        return {**tensors, "score": self._score}, meta

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta)
        self._score = tensors["score"]


class Doubles(Nearest):
    def predict(self, nodes: Nodes) -> np.ndarray:
        return super().predict(nodes).astype(np.float64)


class Single(Nearest):
    def predict(self, nodes: Nodes) -> np.ndarray:
        return super().predict(nodes)[:1]


class NotFinite(Nearest):
    def predict(self, nodes: Nodes) -> np.ndarray:
        return super().predict(nodes) * np.float32(np.nan)


class Noisy(Nearest):
    random = np.random.default_rng(0)

    def predict(self, nodes: Nodes) -> np.ndarray:
        return super().predict(nodes) + self.random.normal(size=len(nodes)).astype(np.float32)


class Centred(Nearest):
    def predict(self, nodes: Nodes) -> np.ndarray:
        values = super().predict(nodes)
        return values - values.mean()


class Negated(Nearest):
    def predict(self, nodes: Nodes) -> np.ndarray:
        return -super().predict(nodes)


class Forgetful(Nearest):
    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        super().load_state(tensors, meta)
        self._score = self._score + 1


class Unwritable(Nearest):
    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = super().state()
        return tensors, {**meta, "options": {1, 2}}


class Overwrites(Nearest):
    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        super().fit(seed, score.copy())
        score[:] = 0


class Whole(Nearest):
    transductive = True


def test_accepts_a_sound_extrapolator() -> None:
    check_extrapolator(Nearest)
    check_extrapolator(Nearest, power=2)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Doubles, "Doubles: predict returns float64; expected float32"),
        (Single, r"Single: predict returns shape \[1\]; expected \[300\]"),
        (NotFinite, "NotFinite: 300 of 300 predictions are not finite"),
        (Noisy, "Noisy: the same input gives other predictions at a second call"),
        (Centred, "Centred: a prediction depends on the other samples"),
        (Negated, "Negated: predictions do not follow the scores"),
        (Forgetful, "Forgetful: predictions differ after state and load_state"),
        (Unwritable, r"Unwritable: state \(the metadata must be JSON\) raises TypeError"),
        (Overwrites, "Overwrites: changes its input score"),
        (Whole, "Whole: is transductive"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_names_what_is_broken(part: type[Extrapolator], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}") as caught:
        check_extrapolator(part)
    assert "\n" not in str(caught.value)
