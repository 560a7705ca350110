"""Settings of the report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from raypipe.config.base import Settings

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class ReportSettings(Settings):
    """The HTML page, and where its figures go beside."""

    images: int = Field(24, ge=0, le=200, description="images in each grid; 0: no images at all")
    classes: int = Field(
        12,
        ge=0,
        le=100,
        description="classes with a histogram and images of their own; of more, those with the most extreme medians",
    )
    class_images: int = Field(
        5, ge=0, le=20, description="images at each end of the scores of such a class"
    )
    cpu_price: float | None = Field(
        None,
        ge=0,
        description="dollars for an hour of a CPU, to say what the run cost; null: not said",
    )
    gpu_price: float | None = Field(None, ge=0, description="the same for an hour of a GPU")
    log_to: tuple[TrackerName, ...] = Field(
        (),
        description="figures and stage timings go there as well, at the end of a run: tensorboard (files in the run), mlflow, wandb (both with "
        "the page and its images); each needs its package: pip install 'raypipe[mlflow]'",
    )
    experiment: str = Field(
        "raypipe",
        min_length=1,
        max_length=128,
        description="MLflow's experiment and the project of Weights & Biases for log_to",
    )

    @field_validator("log_to", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("log_to")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("each at most once")
        return value
