"""Settings of `raypipe evaluate`.

They are not a section of the configuration, because a run can be evaluated in several ways.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.choices import CandidateName
from raypipe.config.select import KeepFraction

MIN_CERTIFY_SEEDS = 3
"""Trainings of each list that a certificate needs."""
MIN_CERTIFY_SAMPLES = 20
"""Test samples that a certificate needs: models can agree on a few of them by chance, and an
interval would then be too narrow."""


class EvaluateSettings(Settings):
    """Train on keep-lists, on random lists of the same size and on the full set."""

    keep: tuple[KeepFraction, ...] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        min_length=1,
        description="Fractions of the samples to keep, 0 to 1.",
    )
    strategies: tuple[CandidateName, ...] = Field(
        (),
        description="Strategies that cut the lists, with the run's other `select` settings. "
        "Default: the run's strategy; ccs if that is auto.",
    )
    scores: tuple[str, ...] = Field(
        (),
        description="Scores to cut lists from. run: those in scores/. measured:NAME: a score that "
        "was measured on every sample. Default: all available.",
    )
    beside: tuple[str, ...] = Field(
        (), description="Other runs over the same source. Their scores are compared as well."
    )
    seeds: Positive = Field(
        3, description="Trainings per list and fraction, and random lists per fraction."
    )
    protocol: Literal["epochs", "steps"] = Field(
        "epochs",
        description="epochs: every list is trained for the same number of epochs. steps: for as "
        "many optimiser steps as the full set.",
    )
    dynamic: tuple[Literal["redrawn", "redrawn-by-score", "infobatch"], ...] = Field(
        (),
        description="Trainings that take other samples in every epoch, compared with random lists "
        "at the same number of steps. redrawn: a random draw of the keep fraction (RS2). "
        "redrawn-by-score: the highest score is three times as likely as the lowest, and losses "
        "are weighted. infobatch: half of the samples below the mean loss are left out.",
    )
    attack: bool = Field(
        False,
        description="Train adversarially, with the run's proxy.adversary or its defaults, and "
        "also test on adversarial examples.",
    )
    certify: bool = Field(
        False,
        description="Choose among the lists on one half of the test set, and certify on the other "
        "half that the chosen one beats random lists.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="Network to train. proxy.model names the choices. Default: the run's.",
    )
    image_size: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="Side of the square images in pixels. Default: the run's proxy.image_size.",
    )
    epochs: Positive | None = Field(
        None, description="Passes over a list. Default: the run's proxy.epochs."
    )
    batch_size: Positive | None = Field(
        None, description="Images per step. Default: the run's proxy.batch_size."
    )
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate. Default: the run's proxy.lr."
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="Use one GPU per training. auto: if the cluster has GPUs."
    )
    cpus_per_training: Positive | Literal["auto"] = Field(
        "auto",
        description="CPUs per training. auto: up to 4 with GPUs; without GPUs 1, or more if "
        "there are fewer trainings than CPUs.",
    )

    @field_validator("keep", "strategies", "scores", "beside", "dynamic", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        single = isinstance(value, int | float | str) and not isinstance(value, bool)
        return [value] if single else value

    @field_validator("keep", "strategies", "scores", "beside", "dynamic")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("scores")
    @classmethod
    def _known_kind(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != "run" and not name.startswith("measured:"):
                raise ValueError(f"{name!r} is neither run nor measured:NAME")
        return value

    @model_validator(mode="after")
    def _seeds_suffice(self) -> EvaluateSettings:
        if self.certify and self.seeds < MIN_CERTIFY_SEEDS:
            raise ValueError(
                f"certify: {self.seeds} seeds say nothing about chance; give seeds "
                f"{MIN_CERTIFY_SEEDS} or more"
            )
        return self

    @model_validator(mode="after")
    def _model_exists(self) -> EvaluateSettings:
        from raypipe.config.choices import is_model, unknown_model

        if self.model is not None and not is_model(self.model):
            raise ValueError(unknown_model(self.model))
        return self
