"""Check a score."""

from __future__ import annotations

from typing import Any

import numpy as np

from raypipe.scores.base import Score
from raypipe.scores.trajectory import STATISTICS, ScoreError, Trajectory
from raypipe.testing.contract import (
    ContractError,
    Unchanged,
    check_declaration,
    failures,
    rank_correlation,
    require,
    twice,
)

SAMPLES, CLASSES, EPOCHS = 240, 5, 40
ALIKE = 0.9
"""Rank correlation with the loss above which a score measures difficulty."""


def check_score(part: type[Score], **options: Any) -> None:
    """Check a score on artificial trajectories of 40 epochs.

    Checked are what the class declares, shape, type and finite values of the scores, their
    orientation (`high_is_hard`), that the same input gives the same scores, that a score depends on
    its own sample alone, that `reads` names all that it uses, and that the input stays unchanged.

    Parameters
    ----------
    part : type of Score
    **options
        Options by name. Default: those of the part.

    Raises
    ------
    ContractError
        What is broken.
    """
    settings = check_declaration(part, Score, options)
    known = (*STATISTICS, "probabilities")
    is_tuple = isinstance(part.reads, tuple)
    require(is_tuple, part, f"reads is {part.reads!r}; expected a tuple, such as ('loss',)")
    unknown = [name for name in part.reads if name not in known]
    require(not unknown, part, f"reads {', '.join(unknown)}; possible are {', '.join(known)}")
    arrays, label = _trajectories()
    read = {name: values for name, values in arrays.items() if name in part.reads}
    require(bool(read), part, "reads nothing of the trajectory")
    unchanged = Unchanged(part, {**read, "label": label})

    def score(rows: np.ndarray) -> np.ndarray:
        taken = {name: np.ascontiguousarray(values[:, rows]) for name, values in read.items()}
        return part(settings).score(Trajectory(label[rows], taken))

    everything = np.arange(SAMPLES)
    try:
        with failures(part, "score"):
            values = part(settings).score(Trajectory(label, read))
    except ContractError as error:
        if isinstance(error.__cause__, ScoreError) and "was read without" in str(error):
            reason = f"{part.__name__}: reads is incomplete: {error.__cause__}"
            raise ContractError(reason) from None
        raise
    unchanged.check()
    is_array = isinstance(values, np.ndarray)
    require(is_array, part, f"score returns {type(values).__name__}, not an array")
    shape = list(values.shape)
    require(shape == [SAMPLES], part, f"score returns shape {shape}; expected {[SAMPLES]}")
    require(values.dtype == np.float32, part, f"score returns {values.dtype}; expected float32")
    bad = int((~np.isfinite(values)).sum())
    require(not bad, part, f"{bad} of {SAMPLES} scores are not finite")
    with failures(part, "score"):
        values = twice(part, lambda: score(everything), "scores")
        order = np.random.default_rng(3).permutation(SAMPLES)[: SAMPLES // 3]
        alone = score(order)
    close = np.allclose(alone, values[order], rtol=1e-4, atol=1e-6)
    require(close, part, "a score depends on the other samples; it must depend on its own alone")
    _check_orientation(part, values, arrays["loss"].mean(0))


def _check_orientation(part: type[Score], values: np.ndarray, loss: np.ndarray) -> None:
    alike = rank_correlation(values, loss)
    if part.high_is_hard:
        require(
            alike > 0,
            part,
            f"high_is_hard is true, but hard samples score low (rank correlation {alike:.2f} with "
            "the loss); negate the score, or set high_is_hard to false",
        )
    else:
        require(
            alike < ALIKE,
            part,
            f"high scores are those of hard samples (rank correlation {alike:.2f} with the loss), "
            "but high_is_hard is false",
        )


def _trajectories() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return trajectories of samples that are easy to hard to learn, and their labels."""
    random = np.random.default_rng(0)
    label = random.integers(0, CLASSES, SAMPLES)
    ease = np.linspace(-1, 6, SAMPLES)[random.permutation(SAMPLES)]
    logits = random.normal(0, 0.7, (EPOCHS, SAMPLES, CLASSES))
    learned = np.linspace(0.2, 1, EPOCHS)[:, None] * ease
    own = learned + random.normal(0, 0.3, (EPOCHS, SAMPLES))
    np.put_along_axis(logits, label[None, :, None], own[..., None], 2)
    exponents = np.exp(logits - logits.max(2, keepdims=True))
    probabilities = (exponents / exponents.sum(2, keepdims=True)).astype(np.float32)
    complete = Trajectory.from_probabilities(probabilities, label)
    arrays = {name: getattr(complete, name) for name in STATISTICS}
    return {**arrays, "probabilities": probabilities}, label
