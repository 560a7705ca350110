"""Scores at checkpoints: which scores, and over which checkpoints they are averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import QUIET, small_config

import raypipe
from raypipe.config import MeanSettings, MeasureSettings
from raypipe.errors import ConfigError
from raypipe.estimate.plan import SourceSize, plan
from raypipe.pipeline import execute
from raypipe.runs.manifests import Checkpoint, TrainedProxy
from raypipe.runs.partition import SeedPart
from raypipe.scores.registry import check_scores
from raypipe.scores.trajectory import STATISTICS, Trajectory
from raypipe.stages.measure.checkpoint_scores import _mean
from raypipe.stages.measure.outputs import OUTPUTS
from raypipe.vision.output_statistics import output_statistics


def test_which_scores_checkpoints_give() -> None:
    config = small_config(
        "runs/x", "measure.scores=[aum, el2n, grand, loss]", "measure.el2n.at=checkpoints"
    )
    assert config.measure.at_checkpoints == (
        "el2n",
        "grand",
        "loss",
    )  # of `SMALL`: loss at checkpoints
    assert small_config("runs/x", "measure.scores=[entropy]").measure.at_checkpoints == ()


@pytest.mark.parametrize(
    ("override", "columns"),
    [
        ("first_epoch=0", [0, 1, 2]),
        ("first_epoch=3", [1, 2]),
        ("last_epoch=3", [0]),
        ("last_epoch=99", [0, 1, 2]),
    ],
)
def test_the_mean_is_over_checkpoints_of_the_epochs_asked_for(
    override: str, columns: list[int]
) -> None:
    config = small_config("runs/x", f"measure.loss.{override}")
    checkpoints = tuple(Checkpoint(epoch, 0.1, f"{epoch}.safetensors") for epoch in (1, 3, 5))
    part = SeedPart(0, 1, 0, 5, (5,), TrainedProxy(6, 6, (), checkpoints, ""))
    values = np.random.default_rng(0).random((5, 3))
    np.testing.assert_allclose(
        _mean(config, part, values, "loss"), values[:, columns].mean(1), rtol=1e-6
    )


def test_no_checkpoint_among_the_epochs_is_refused_before_anything_starts() -> None:
    message = r"loss: no checkpoint is between first_epoch 2 and last_epoch 3; checkpoints are at epochs 1, 3"
    with pytest.raises(ConfigError, match=message) as refused:
        small_config("runs/x", "measure.loss.first_epoch=2", "measure.loss.last_epoch=3")
    assert "digits://" not in str(refused.value), "not the whole configuration"
    assert small_config("runs/x", "measure.loss.first_epoch=2", "measure.loss.at=trajectory")


def test_without_a_trajectory_scores_at_checkpoints_are_left() -> None:
    assert small_config("runs/x", "measure.scores=[moso, loss]", "proxy.trajectory=none")
    with pytest.raises(ConfigError, match="el2n cannot be computed without a trajectory"):
        small_config("runs/x", "measure.scores=[moso, loss, el2n]", "proxy.trajectory=none")


def test_a_score_that_needs_more_epochs_than_the_proxy_has_is_refused_before_they_are_trained() -> (
    None
):
    short = small_config("runs/x", "measure.scores=[el2n, tdds]")
    for begin in (
        lambda: execute(short, progress=QUIET),
        lambda: raypipe.inspect(config=short),
        lambda: plan(short, SourceSize(1000)),
    ):
        with pytest.raises(
            ConfigError,
            match=r"measure.scores: tdds needs at least 10 epochs .* has 4; raise proxy.epochs",
        ):
            begin()
    check_scores(
        small_config(
            "runs/x", "measure.scores=[el2n, tdds, forgetting, aum]", "measure.tdds.window=4"
        )
    )
    with pytest.raises(ConfigError, match="no epochs between first_epoch 5"):
        execute(
            small_config("runs/x", "measure.scores=[el2n]", "measure.el2n.first_epoch=5"),
            progress=QUIET,
        )


def test_numbers_of_a_forward_pass_are_those_of_its_probabilities() -> None:
    logits, label = (
        torch.from_numpy(np.random.default_rng(1).normal(0, 2, (40, 5)).astype(np.float32)),
        torch.arange(40) % 5,
    )
    found = output_statistics(logits, label)
    expected = Trajectory.from_probabilities(logits.softmax(1).numpy()[None], label.numpy())
    assert tuple(found) == STATISTICS
    for name in STATISTICS:
        np.testing.assert_allclose(
            found[name].numpy(), getattr(expected, name)[0], rtol=1e-4, atol=1e-5
        )


def test_every_score_with_means_at_checkpoints_names_its_statistic() -> None:
    means = {
        name.replace("_", "-")
        for name, field in MeasureSettings.model_fields.items()
        if isinstance(field.default, MeanSettings)
    }
    assert means == set(OUTPUTS)
