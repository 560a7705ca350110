"""What a trajectory score is given, and the registry of all scores.

A measured score is either MoSo or GraNd, from gradients at the proxy's checkpoints, or a function of the proxy's
trajectory. A trajectory score is one file with one function

    score(trajectory: Trajectory, **options) -> float32 [samples]

and one line in `SCORES`. **Higher always means: keep.** A score whose paper keeps the low end is negated where it is defined.

Rules common to all trajectory scores:

- An epoch in which a sample was not seen (a probability that is not finite) takes the values of the epoch before it, as in
  the official code of Dynamic Uncertainty; before the first one seen, those of the first. A sample never seen is an error.
- Fewer epochs than a score needs is an error that names both numbers.
- Scores do not compare a sample with others, so a class with one sample is nothing special.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError

SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
"""Probabilities are stored as float16; one that became 0 there counts as this in a logarithm."""


class ScoreError(RaypipeError):
    """A score cannot be computed from what it was given."""


@dataclass(frozen=True)
class Trajectory:
    """What the proxy said of some samples at every epoch. Made by `trajectory`, which checks and fills.

    probabilities  float32 [epochs, samples, classes]
    label          int64 [samples]
    margin         float32 [epochs, samples], logit of the label minus the largest other logit
    """

    probabilities: np.ndarray
    label: np.ndarray
    margin: np.ndarray

    @property
    def epochs(self) -> int:
        return len(self.probabilities)

    @property
    def own(self) -> np.ndarray:
        """Probability of the label, float32 [epochs, samples]."""
        return np.take_along_axis(self.probabilities, self.label[None, :, None], 2)[..., 0]


def trajectory(probabilities: np.ndarray, label: np.ndarray, margin: np.ndarray | None = None) -> Trajectory:
    """A checked trajectory.

    probabilities  float [epochs, samples, classes], not finite where a sample was not seen in an epoch
    label          int [samples]
    margin         float [epochs, samples] of the logits; without it, that of the log-probabilities, which is the same number
                   as long as no probability is 0
    Raises ScoreError for shapes that do not fit, labels outside the classes, and samples never seen.
    """
    probabilities = np.asarray(probabilities, np.float32)
    label = np.asarray(label, np.int64)
    if probabilities.ndim != 3 or label.shape != probabilities.shape[1:2]:
        raise ScoreError(
            f"a trajectory is [epochs, samples, classes] with a label per sample, not {probabilities.shape}, {label.shape}"
        )
    if probabilities.shape[0] < 1 or probabilities.shape[2] < 2:
        raise ScoreError(f"a trajectory needs an epoch and two classes, not {probabilities.shape}")
    if len(label) and not ((label >= 0) & (label < probabilities.shape[2])).all():
        raise ScoreError(f"labels must be 0..{probabilities.shape[2] - 1}")
    if margin is None:
        margin = margin_of(probabilities, label)
    margin = np.asarray(margin, np.float32)
    seen = np.isfinite(probabilities).all(2) & np.isfinite(margin)
    if seen.all():
        return Trajectory(probabilities, label, margin)
    never = ~seen.any(0)
    if never.any():
        raise ScoreError(
            f"{int(never.sum())} samples have no finite prediction in any epoch; the training diverged (lower proxy.lr)"
        )
    source = _last_seen(seen)
    columns = np.arange(len(label))[None]
    return Trajectory(probabilities[source, columns], label, margin[source, columns])


def margin_of(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """log p_label - max log p_other, float32 [epochs, samples]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.maximum(probabilities, SMALLEST, dtype=np.float32))
    own = np.take_along_axis(logs, label[None, :, None], 2)[..., 0]
    others = logs.copy()
    np.put_along_axis(others, label[None, :, None], -np.inf, 2)
    return (own - others.max(2)).astype(np.float32)


def _last_seen(seen: np.ndarray) -> np.ndarray:
    """For every epoch and sample the epoch whose values it takes: [epochs, samples]."""
    epochs = np.arange(len(seen))[:, None]
    last = np.maximum.accumulate(np.where(seen, epochs, -1), 0)
    return np.where(last < 0, seen.argmax(0)[None], last)


@dataclass(frozen=True)
class ScoreInfo:
    """One line of the registry.

    needs   gradients or trajectory
    cost    what it costs beyond training the proxy, in words
    source  the paper
    """

    name: str
    summary: str
    needs: str
    cost: str
    source: str


SCORES = {
    info.name: info
    for info in (
        ScoreInfo("moso", "alignment of a sample's gradient with the mean gradient", "gradients",
                  "about 5 forward passes of the seed set per checkpoint", "arXiv 2310.14664"),
        ScoreInfo("grand", "length of a sample's gradient", "gradients",
                  "1 forward pass (head) or about 4 (all) of the seed set per checkpoint", "arXiv 2107.07075"),
        ScoreInfo("dynamic-uncertainty", "spread of the label's probability over sliding windows of epochs", "trajectory",
                  "none", "arXiv 2306.05175"),
        ScoreInfo("tdds", "spread of the change of all probabilities between epochs", "trajectory", "none", "arXiv 2311.13613"),
        ScoreInfo("el2n", "distance of the probabilities from the one-hot label", "trajectory", "none", "arXiv 2107.07075"),
        ScoreInfo("forgetting", "how often a learned sample is forgotten again", "trajectory", "none", "arXiv 1812.05159"),
        ScoreInfo("aum", "negated mean margin of the label's logit: hard samples high", "trajectory", "none", "arXiv 2001.10528"),
        ScoreInfo("dual", "Dynamic Uncertainty times the label's mean improbability", "trajectory", "none", "arXiv 2502.06905"),
        ScoreInfo("loss", "mean cross-entropy", "trajectory", "none", "baseline"),
        ScoreInfo("entropy", "mean entropy of the probabilities", "trajectory", "none", "baseline"),
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


def need_epochs(name: str, epochs: int, least: int, why: str) -> None:
    """Raise ScoreError when there are fewer epochs than a score needs."""
    if epochs < least:
        raise ScoreError(f"{name} needs at least {least} epochs ({why}), the trajectory has {epochs}; raise proxy.epochs")


def spans(epochs: int, first: int, last: int | None) -> slice:
    """The epochs a mean is taken over: `first` (0-based) up to and without `last` (None: to the end). Raises ScoreError when empty."""
    if not 0 <= first < (epochs if last is None else min(last, epochs)):
        raise ScoreError(f"no epochs between first_epoch {first} and last_epoch {last}: the trajectory has {epochs}")
    return slice(first, last)
