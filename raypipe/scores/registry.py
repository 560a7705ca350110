"""The registry of measured scores.

A measured score is either computed from gradients at the proxy's checkpoints (MoSo, GraNd) or is a
function of the proxy's trajectory. **Higher always means: keep.** A score whose paper keeps the low
end is negated where it is defined.

To add a trajectory score:

1. Write `raypipe/scores/my_score.py` with the paper's formula at its top and one function
   ``score(trajectory, **options)`` that returns float32 [samples].
2. Add an entry to `SCORES`. The module is found by name: "my-score" is `raypipe.scores.my_score`.
3. Add the name to `OwnScore` in `raypipe.config.measure`, and a field ``my_score`` with the
   options to `MeasureSettings`. They are passed to ``score`` as keyword arguments.
4. If a high score means a hard sample, which can be mislabelled, add the name to `DIFFICULTIES` in
   `raypipe.config.choices`.

For example, the mean probability of any class but the label::

    # raypipe/scores/error.py
    def score(trajectory: Trajectory, last_epoch: int | None = None) -> np.ndarray:
        epochs = epoch_range(trajectory.epochs, 0, last_epoch)
        return 1 - trajectory.label_probability[epochs].mean(0)

    # an entry of SCORES; label_probability is computed from the loss
    ScoreInfo(
        name="error",
        summary="mean probability of all classes but the label",
        needs="trajectory",
        cost="none",
        source="this example",
        reads=("loss",),
    )

    # raypipe/config/measure.py
    class ErrorSettings(Settings):
        last_epoch: int | None = Field(None, ge=1, description="use only the epochs before it")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np

from raypipe.config import Config
from raypipe.config.parts import validated_options
from raypipe.errors import ConfigError
from raypipe.plugins import SCORE, allows_code, find
from raypipe.scores.base import Score, checked_score
from raypipe.scores.trajectory import STATISTICS, ScoreError, Trajectory


@dataclass(frozen=True)
class ScoreInfo:
    """One entry of the registry.

    Attributes
    ----------
    name : str
        As in `measure.scores`.
    summary : str
        What the score measures, in a few words.
    needs : {"gradients", "trajectory"}
        What the score is computed from.
    cost : str
        Cost beyond training the proxy, in words. With `at: checkpoints` one forward pass per
        checkpoint comes on top.
    source : str
        The paper.
    reads : tuple[str, ...]
        What a trajectory score reads from the trajectory: some of
        `raypipe.scores.trajectory.STATISTICS`, or "probabilities", from which everything else can
        be computed. Only these are read from storage: a statistic takes 4 bytes per sample and
        epoch, probabilities take 2 bytes per sample, epoch and class.
    """

    name: str
    summary: str
    needs: Literal["gradients", "trajectory"]
    cost: str
    source: str
    reads: tuple[str, ...] = ("probabilities",)


SCORES = {
    info.name: info
    for info in (
        ScoreInfo(
            "moso",
            "alignment of a sample's gradient with the mean gradient",
            "gradients",
            "about 7 forward passes of the seed set per checkpoint",
            "arXiv 2310.14664",
        ),
        ScoreInfo(
            "grand",
            "length of a sample's gradient",
            "gradients",
            "1 forward pass (head) or about 4 (all) of the seed set per checkpoint",
            "arXiv 2107.07075",
        ),
        ScoreInfo(
            "dynamic-uncertainty",
            "spread of the label's probability over sliding windows of epochs",
            "trajectory",
            "none",
            "arXiv 2306.05175",
            ("loss",),
        ),
        ScoreInfo(
            "tdds",
            "spread of the change of all probabilities between epochs",
            "trajectory",
            "none",
            "arXiv 2311.13613",
        ),
        ScoreInfo(
            "el2n",
            "distance of the probabilities from the one-hot label",
            "trajectory",
            "none",
            "arXiv 2107.07075",
            ("distance",),
        ),
        ScoreInfo(
            "forgetting",
            "how often a learned sample is forgotten again",
            "trajectory",
            "none",
            "arXiv 1812.05159",
            ("margin",),
        ),
        ScoreInfo(
            "aum",
            "negated mean margin of the label's logit, so hard samples score high",
            "trajectory",
            "none",
            "arXiv 2001.10528",
            ("loss", "margin"),
        ),
        ScoreInfo(
            "dual",
            "Dynamic Uncertainty times the label's mean improbability",
            "trajectory",
            "none",
            "arXiv 2502.06905",
            ("loss",),
        ),
        ScoreInfo("loss", "mean cross-entropy", "trajectory", "none", "baseline", ("loss",)),
        ScoreInfo(
            "entropy",
            "mean entropy of the probabilities",
            "trajectory",
            "none",
            "baseline",
            ("entropy",),
        ),
    )
}
"""Every measured score of raypipe by name."""


def score_info(name: str) -> ScoreInfo:
    """Return the entry of a score, also of one from outside.

    Raises
    ------
    ConfigError
        If a score from outside cannot be imported, or must not be.
    """
    if name in SCORES:
        return SCORES[name]
    score = _outside(name)
    return ScoreInfo(name, score.summary, "trajectory", "none", score.paper, score.reads)


def _outside(name: str) -> type[Score]:
    """Return the class of a score from outside. Raises ConfigError if it cannot be used."""
    score: type[Score] = find(SCORE, name, Score)
    known = (*STATISTICS, "probabilities")
    reads: Any = score.reads
    if not isinstance(reads, tuple) or not reads or not set(reads) <= set(known):
        raise ConfigError(
            f"measure.scores: reads of {name!r} is {reads!r}; expected a tuple, such as "
            f"('loss',), with some of {', '.join(known)}"
        )
    return score


def trajectory_score(name: str) -> Callable[..., np.ndarray]:
    """Return the function of a trajectory score.

    Raises
    ------
    ScoreError
        If a score of raypipe is not computed from the trajectory.
    ConfigError
        If a score from outside cannot be imported, or must not be.
    """
    if name not in SCORES:
        score = _outside(name)
        return lambda trajectory, **options: checked_score(
            name, score, validated_options(score, SCORE, name, {name: options}), trajectory
        )
    if SCORES[name].needs != "trajectory":
        names = ", ".join(key for key, info in SCORES.items() if info.needs == "trajectory")
        raise ScoreError(f"{name!r} is not a trajectory score; those are {names}")
    module: Any = import_module(f"raypipe.scores.{name.replace('-', '_')}")
    return module.score


def check_epochs(name: str, epochs: int, options: Mapping[str, Any]) -> None:
    """Raise ScoreError if a trajectory score cannot be computed from this many epochs.

    The check runs the score on one artificial sample, so it costs nothing and needs no training.
    The sample has what the score reads, and nothing else.
    """
    statistics = {column: np.full((epochs, 1), 0.5, np.float32) for column in STATISTICS}
    arrays = {"probabilities": np.full((epochs, 1, 2), 0.5, np.float32), **statistics}
    arrays = {column: arrays[column] for column in score_info(name).reads}
    trajectory_score(name)(Trajectory(np.zeros(1, np.int64), arrays), **options)


def check_scores(config: Config) -> None:
    """Raise ConfigError if a score needs more epochs than the proxy will be trained for.

    Scores from outside are checked where their code can be imported.
    """
    for name in sorted(config.measure.from_trajectory):
        if name not in SCORES and not allows_code():
            continue
        try:
            check_epochs(name, config.proxy.passes, config.measure.trajectory_options(name))
        except ScoreError as error:
            text = str(error).removeprefix("measure.scores: ")
            raise ConfigError(f"measure.scores: {text}") from None
