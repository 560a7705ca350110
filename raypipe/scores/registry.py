"""The registry of measured scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from raypipe.config import Config
from raypipe.errors import ConfigError
from raypipe.scores.trajectory import STATISTICS, ScoreError, Trajectory


@dataclass(frozen=True)
class ScoreInfo:
    """One line of the registry.

    needs   gradients or trajectory cost    what it costs beyond training the proxy, in words;
    with `at: checkpoints` a forward pass per checkpoint more source  the paper reads   what a
    trajectory score takes from the trajectory: some of `NUMBERS`, or the probabilities, from
    which everything
            follows. Only this is read from storage: a number is 4 bytes per sample and epoch,
            probabilities 2 bytes per class
    """

    name: str
    summary: str
    needs: str
    cost: str
    source: str
    reads: tuple[str, ...] = ("probabilities",)


SCORES = {
    info.name: info
    for info in (
        ScoreInfo("moso", "alignment of a sample's gradient with the mean gradient", "gradients",
                  "about 7 forward passes of the seed set per checkpoint", "arXiv 2310.14664"),
        ScoreInfo("grand", "length of a sample's gradient", "gradients",
                  "1 forward pass (head) or about 4 (all) of the seed set per checkpoint", "arXiv 2107.07075"),
        ScoreInfo("dynamic-uncertainty", "spread of the label's probability over sliding windows of epochs", "trajectory",
                  "none", "arXiv 2306.05175", ("loss",)),
        ScoreInfo("tdds", "spread of the change of all probabilities between epochs", "trajectory", "none", "arXiv 2311.13613"),
        ScoreInfo("el2n", "distance of the probabilities from the one-hot label", "trajectory",
                  "none", "arXiv 2107.07075", ("distance",)),
        ScoreInfo("forgetting", "how often a learned sample is forgotten again", "trajectory",
                  "none", "arXiv 1812.05159", ("margin",)),
        ScoreInfo("aum", "negated mean margin of the label's logit: hard samples high", "trajectory",
                  "none", "arXiv 2001.10528", ("loss", "margin")),
        ScoreInfo("dual", "Dynamic Uncertainty times the label's mean improbability", "trajectory", "none", "arXiv 2502.06905", ("loss",)),
        ScoreInfo("loss", "mean cross-entropy", "trajectory", "none", "baseline", ("loss",)),
        ScoreInfo("entropy", "mean entropy of the probabilities", "trajectory", "none", "baseline", ("entropy",)),
    )
}  # fmt: skip
"""Every measured score."""


def trajectory_score(name: str) -> Callable[..., np.ndarray]:
    """The function of a trajectory score."""
    if name not in SCORES or SCORES[name].needs != "trajectory":
        raise ScoreError(
            f"{name!r} is not a trajectory score: {', '.join(key for key, info in SCORES.items() if info.needs == 'trajectory')}"
        )
    module: Any = import_module(f"raypipe.scores.{name.replace('-', '_')}")
    return module.score


def check_epochs(name: str, epochs: int, options: Mapping[str, Any]) -> None:
    """Raise ScoreError when a trajectory score cannot be computed of so many epochs, before these
    are trained.
    """
    numbers = {column: np.full((epochs, 1), 0.5, np.float32) for column in STATISTICS}
    arrays = {"probabilities": np.full((epochs, 1, 2), 0.5, np.float32), **numbers}
    trajectory_score(name)(Trajectory(np.zeros(1, np.int64), arrays), **options)


def check_scores(config: Config) -> None:
    """Raise ConfigError where a score needs more epochs than the proxy will have."""
    for name in sorted(set(config.measure.scores) - set(config.measure.at_checkpoints)):
        try:
            check_epochs(name, config.proxy.epochs, config.measure.trajectory_options(name))
        except ScoreError as error:
            raise ConfigError(f"measure.scores: {error}") from None
