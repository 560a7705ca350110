"""Settings of the report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from raypipe.config.base import Settings

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class ReportSettings(Settings):
    """Report: the HTML page, and trackers that receive its figures."""

    images: int = Field(24, ge=0, le=200, description="Images in each grid. 0: no images at all.")
    classes: int = Field(
        12,
        ge=0,
        le=100,
        description="Classes shown with a histogram and images. If there are more, those with the "
        "most extreme medians are shown.",
    )
    class_images: int = Field(
        5, ge=0, le=20, description="Images at each end of the scores of such a class."
    )
    cpu_price: float | None = Field(
        None,
        ge=0,
        description="Price of a CPU hour in dollars, to report the cost of the run. null: not "
        "reported.",
    )
    gpu_price: float | None = Field(
        None, ge=0, description="Price of a GPU hour in dollars. null: not reported."
    )
    log_to: tuple[TrackerName, ...] = Field(
        (),
        description="Trackers that receive figures and stage timings at the end of a run: "
        "tensorboard (files in the run), mlflow, wandb (both also get the page and its images). "
        "Each needs its package: pip install 'raypipe[mlflow]'.",
    )
    experiment: str = Field(
        "raypipe",
        min_length=1,
        max_length=128,
        description="MLflow experiment, and Weights & Biases project, for log_to.",
    )

    @field_validator("log_to", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("log_to")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("name each tracker at most once")
        return value
