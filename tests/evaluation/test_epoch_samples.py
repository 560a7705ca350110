"""Trainings that take other samples in every epoch."""

from __future__ import annotations

import numpy as np
import pytest

from raypipe.config import ProxySettings
from raypipe.config.evaluate import EvaluateSettings
from raypipe.evaluation.epoch_samples import BY_SCORE, INFOBATCH, REDRAWN, EpochSamples
from raypipe.evaluation.lists import FULL, RANDOM, ListedSamples, SamplePool
from raypipe.evaluation.trainings import trainings_of
from raypipe.selection import hash64
from raypipe.vision import fitting

HASHES = hash64([f"s{row}" for row in range(90)])
SCORE = np.linspace(0, 1, 90, dtype=np.float32)
POOL = SamplePool((("f", 90),), np.zeros(90, np.int64), np.arange(90), "digest")


def test_redrawn_rows_are_others_in_every_epoch_and_by_score() -> None:
    rows = EpochSamples(REDRAWN, 30, HASHES, SCORE[:0]).start(0)
    first, weights = rows.choose(0, 0.0)
    assert len(first) == 30 and weights == pytest.approx(np.ones(30))
    assert set(first) != set(rows.choose(1, 0.1)[0])
    assert set(first) != set(
        EpochSamples(REDRAWN, 30, HASHES, SCORE[:0]).start(1).choose(0, 0.0)[0]
    )

    by_score = EpochSamples(BY_SCORE, 30, HASHES, SCORE).start(0)
    draws = [by_score.choose(epoch, 0.0) for epoch in range(600)]
    counts = np.bincount(np.concatenate([rows for rows, _ in draws]), minlength=90)
    assert counts[-9:].mean() / counts[:9].mean() == pytest.approx(3, rel=0.2)
    means = [float((weight * SCORE[rows]).mean()) for rows, weight in draws]
    assert np.mean(means) == pytest.approx(SCORE.mean(), abs=4 * np.std(means) / 600**0.5)


def test_infobatch_resumes_from_its_losses() -> None:
    samples = EpochSamples(INFOBATCH, 30, HASHES, SCORE[:0])
    rows = samples.start(0)
    everything, _ = rows.choose(0, 0.0)
    assert len(everything) == 90
    rows.record(everything, SCORE)
    again = samples.start(0)
    again.restore(rows.state())
    chosen, weights = rows.choose(1, 0.5)
    assert len(chosen) == 90 - 22 and weights.sum() == pytest.approx(90, abs=0.01)
    assert again.choose(1, 0.5)[0].tolist() == chosen.tolist()


def test_a_training_has_as_many_steps_as_on_a_random_list_and_a_name_of_its_own() -> None:
    kinds = (REDRAWN, BY_SCORE, INFOBATCH)
    lists = [
        ListedSamples(FULL, 1.0, np.arange(90)),
        ListedSamples(RANDOM, 0.3, np.arange(27), draw=0),
        *(
            ListedSamples(kind, 0.3, np.arange(90), dynamic=EpochSamples(kind, 27, HASHES, SCORE))
            for kind in kinds
        ),
    ]
    recipe = ProxySettings(epochs=5, batch_size=8, checkpoints=1)
    found = trainings_of(lists, POOL, recipe, EvaluateSettings(seeds=1), "data", False)
    steps = {item.listed.name: item.steps for item in found}
    assert len({item.name for item in found}) == 5
    assert {steps[name] for name in (RANDOM, *kinds)} == {fitting.steps_of(recipe, 27)}
    assert steps[FULL] > steps[RANDOM]
