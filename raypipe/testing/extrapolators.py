"""Check an extrapolator."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from raypipe.config import ExtrapolateSettings
from raypipe.config.parts import part_names_accepted
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.testing.contract import (
    Unchanged,
    check_declaration,
    failures,
    rank_correlation,
    require,
    twice,
)

SEED, OTHERS, CLASSES, WIDTH = 400, 300, 4, 12


def check_extrapolator(part: type[Extrapolator], **options: Any) -> None:
    """Check an extrapolator on artificial scores of 700 samples, 400 of them measured.

    Checked are what the class declares, shape, type and finite values of the predictions, their
    orientation, that the same input gives the same predictions, that a prediction depends on its
    own sample alone, that `load_state` restores `state`, and that the input stays unchanged.

    Parameters
    ----------
    part : type of Extrapolator
    **options
        Options by name. Default: those of the part.

    Raises
    ------
    ContractError
        What is broken.
    """
    chosen = check_declaration(part, Extrapolator, options).model_dump()
    require(not part.transductive, part, "is transductive, which only raypipe's own can be")
    with part_names_accepted():
        settings = ExtrapolateSettings(method="tested", options={"tested": chosen})
    seed, score = _samples(SEED, 1)
    others, expected = _samples(OTHERS, 2)
    arrays = {**vars(seed), "score": score}
    unchanged = Unchanged(part, arrays)

    def fitted() -> Extrapolator:
        result = part(settings, CLASSES)
        result.fit(seed, score)
        return result

    part.name = getattr(part, "name", "tested")
    with failures(part, "fit"):
        extrapolator = fitted()
    unchanged.check()
    asked = Unchanged(part, vars(others))
    with failures(part, "predict"):
        values = extrapolator.predict(others)
    asked.check()
    is_array = isinstance(values, np.ndarray)
    require(is_array, part, f"predict returns {type(values).__name__}, not an array")
    shape = list(values.shape)
    require(shape == [OTHERS], part, f"predict returns shape {shape}; expected {[OTHERS]}")
    require(values.dtype == np.float32, part, f"predict returns {values.dtype}; expected float32")
    bad = int((~np.isfinite(values)).sum())
    require(not bad, part, f"{bad} of {OTHERS} predictions are not finite")
    with failures(part, "predict"):
        values = twice(part, lambda: fitted().predict(others), "predictions")
        rows = np.random.default_rng(3).permutation(OTHERS)[: OTHERS // 3]
        alone = extrapolator.predict(others.take(rows))
    close = np.allclose(alone, values[rows], rtol=1e-3, atol=1e-4)
    require(
        close, part, "a prediction depends on the other samples; it must depend on its own alone"
    )
    alike = rank_correlation(values, expected)
    require(
        alike > 0.2,
        part,
        f"predictions do not follow the scores (rank correlation {alike:.2f} on scores that the "
        "embeddings determine)",
    )
    _check_state(part, settings, extrapolator, others, values)
    with failures(part, "predict_with_doubt"):
        doubt = extrapolator.predict_with_doubt(others)[1]
    require(doubt.shape == (OTHERS, 4), part, f"doubt has shape {list(doubt.shape)}")


def _check_state(
    part: type[Extrapolator],
    settings: ExtrapolateSettings,
    extrapolator: Extrapolator,
    others: Nodes,
    values: np.ndarray,
) -> None:
    """Check that a fitted extrapolator is what its state restores."""
    with failures(part, "state"):
        tensors, metadata = extrapolator.state()
    wrong = [name for name, value in tensors.items() if not isinstance(value, np.ndarray)]
    require(not wrong, part, f"state: {', '.join(wrong)} is not an array")
    with failures(part, "state (the metadata must be JSON)"):
        metadata = json.loads(json.dumps(metadata))
    restored = part(settings, CLASSES)
    with failures(part, "load_state"):
        restored.load_state(tensors, metadata)
        again = restored.predict(others)
    require(np.array_equal(again, values), part, "predictions differ after state and load_state")


def _samples(count: int, seed: int) -> tuple[Nodes, np.ndarray]:
    """Return samples whose scores their embeddings determine, up to a little noise."""
    random = np.random.default_rng(seed)
    label = random.integers(0, CLASSES, count)
    embedding = random.normal(size=(count, WIDTH))
    score = embedding[:, CLASSES] + 0.5 * label + random.normal(0, 0.05, count)
    embedding[np.arange(count), label] += 3
    signals = np.stack([np.exp(score / 3), -score, 0.1 * np.abs(score)], 1)
    return Nodes(embedding, label, signals), score
