"""`Score`, the base class of scores from outside raypipe."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import numpy as np

from raypipe.config.base import Settings
from raypipe.config.parts import NoOptions
from raypipe.errors import RaypipeError
from raypipe.plugins import failure
from raypipe.scores.trajectory import ScoreError, Trajectory


class Score(abc.ABC):
    """A score that is computed from the trajectory of a sample. Higher always means: keep.

    A package declares a subclass as an entry point of the group `raypipe.scores`, or
    `measure.scores` names it as `module:Class`. `raypipe.testing.check_score` checks one.

    Parameters
    ----------
    options : Settings
        An instance of `Options`.

    Attributes
    ----------
    Options : type of Settings
        The options, which stand in `measure.options` under the name of the score.
    summary : str
        What the score measures, in a few words.
    paper : str
        Where it was published.
    reads : tuple of str
        What it reads of the trajectory: some of `raypipe.scores.trajectory.STATISTICS`, or
        "probabilities", from which everything else can be computed but which take more space.
    high_is_hard : bool
        Whether a high score means a sample that is hard to learn, which can be mislabelled.

    Examples
    --------
    The mean probability of all classes but the label:

    >>> class Improbability(Score):
    ...     summary = "mean probability of all classes but the label"
    ...     reads = ("loss",)
    ...     high_is_hard = True
    ...
    ...     def score(self, trajectory):
    ...         return 1 - trajectory.label_probability.mean(0)
    """

    Options: ClassVar[type[Settings]] = NoOptions
    summary: ClassVar[str]
    paper: ClassVar[str] = "no paper"
    reads: ClassVar[tuple[str, ...]] = ("probabilities",)
    high_is_hard: ClassVar[bool] = False

    def __init__(self, options: Settings) -> None:
        self.options: Any = options

    @abc.abstractmethod
    def score(self, trajectory: Trajectory) -> np.ndarray:
        """Return float32 [samples].

        A score depends on its own sample alone, so that the seed set can be scored in parts. The
        same trajectory always gives the same scores; it is not changed.
        """


def checked_score(
    name: str, part: type[Score], options: Settings, trajectory: Trajectory
) -> np.ndarray:
    """Return what a score from outside computes, float32 [samples].

    Raises
    ------
    ScoreError
        If it fails, or its result has another shape or type, or values that are not finite.
    """
    try:
        values = part(options).score(trajectory)
    except RaypipeError as error:
        if name in str(error):
            raise
        raise ScoreError(f"measure.scores: {name}: {error}") from error
    except Exception as error:
        raise ScoreError(f"measure.scores: {name} failed ({failure(error)})") from error
    expected = (len(trajectory.label),)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise ScoreError(f"measure.scores: {name} returned {kind}; expected an array of float32")
    if values.shape != expected:
        raise ScoreError(
            f"measure.scores: {name} returned shape {list(values.shape)}; expected "
            f"{list(expected)}, one number per sample"
        )
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ScoreError(
            f"measure.scores: {name}: {bad} of {len(values)} scores are not finite; return a "
            "finite number for every sample"
        )
    return values.astype(np.float32, copy=False)
