"""Settings shared by the stages that run a network in a pool of actors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raypipe.config.base import Positive, Settings


class PoolSettings(Settings):
    """Size of an autoscaling pool of actors."""

    batch_size: Positive | Literal["auto"] = Field(
        "auto",
        description="images in one pass; auto: 64 on a CPU, where more only take memory, 256 of 224 pixels on a GPU, up to 2,048 smaller ones. "
        "A GPU whose memory does not do takes half as many",
    )
    min_actors: Positive = Field(1, description="actors that are always there")
    max_actors: Positive | Literal["auto"] = Field(
        "auto",
        description="auto: as many as the GPUs, or the CPUs where there is no GPU, have room for, also those of nodes that come later",
    )
    use_gpu: bool | Literal["auto"] = Field("auto", description="auto: when the cluster has any")
    actors_per_gpu: int = Field(
        1,
        ge=1,
        le=100,
        description="actors that share a GPU and its memory: more keep it busy where a small network leaves it waiting",
    )

    @model_validator(mode="after")
    def _bounds(self) -> PoolSettings:
        if self.max_actors != "auto" and self.max_actors < self.min_actors:
            raise ValueError(
                f"max_actors ({self.max_actors}) cannot be less than min_actors ({self.min_actors})"
            )
        return self

    def images_at_once(self, gpu: bool, image_size: int) -> int:
        """`batch_size` as a number, for images of so many pixels a side."""
        if self.batch_size != "auto":
            return self.batch_size
        return min(2048, max(1, round(256 * (224 / image_size) ** 2))) if gpu else 64
