"""What `raypipe evaluate` compares. No section of a configuration: a run can be evaluated in several ways."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.choices import ScoreStrategyName
from raypipe.config.select import KeepFraction


class EvaluateSettings(Settings):
    """Trainings on keep-lists, on random lists of the same size and on everything."""

    keep: tuple[KeepFraction, ...] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9), min_length=1, description="fractions to keep"
    )
    strategies: tuple[ScoreStrategyName, ...] = Field(
        (),
        description="by which lists are cut, with the run's other settings of `select`; default: the run's own",
    )
    scores: tuple[str, ...] = Field(
        (),
        description="scores that lists are cut from: run, those in scores/; measured:NAME, one that was measured of every sample; "
        "default: all there are",
    )
    beside: tuple[str, ...] = Field(
        (), description="other runs over the same source, whose scores are lists as well"
    )
    seeds: Positive = Field(
        3, description="trainings of each list, and random lists, at each fraction"
    )
    protocol: Literal["epochs", "steps"] = Field(
        "epochs",
        description="what all trainings have alike: epochs, or optimiser steps (those of the full set)",
    )
    attack: bool = Field(
        False,
        description="train adversarially, as the run's proxy.adversary or its defaults say, and test on adversarial examples as well",
    )
    model: str | None = Field(
        None, min_length=1, description="what is trained: as proxy.model; default: the run's"
    )
    image_size: int | None = Field(
        None, ge=8, le=1024, description="pixels, square; default: the run's proxy.image_size"
    )
    epochs: Positive | None = Field(None, description="default: the run's proxy.epochs")
    batch_size: Positive | None = Field(
        None, description="images per step; default: the run's proxy.batch_size"
    )
    lr: float | None = Field(
        None, gt=0, description="peak learning rate; default: the run's proxy.lr"
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="a GPU for each training; auto: when the cluster has any"
    )
    cpus_per_training: Positive | Literal["auto"] = Field(
        "auto",
        description="auto: 1 where there are no GPUs, more where trainings are fewer than CPUs; else up to 4",
    )

    @field_validator("keep", "strategies", "scores", "beside", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        single = isinstance(value, int | float | str) and not isinstance(value, bool)
        return [value] if single else value

    @field_validator("keep", "strategies", "scores", "beside")
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
    def _model_exists(self) -> EvaluateSettings:
        from raypipe.config.choices import PROXY_MODELS

        if self.model is not None and self.model not in PROXY_MODELS:
            raise ValueError(f"model: {self.model!r} is not one of {', '.join(PROXY_MODELS)}")
        return self
