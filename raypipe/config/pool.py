"""Settings that all stages with a network in a pool of actors share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raypipe.config.base import Positive, Settings


class PoolSettings(Settings):
    """An autoscaling pool of actors."""

    batch_size: Positive | Literal["auto"] = Field(
        "auto",
        description="Images per forward pass. auto: 64 on a CPU (more only take memory; embed "
        "takes at most 32); on a GPU 256 of 224 pixels, or up to 2,048 smaller ones. Halved when "
        "the GPU runs out of memory.",
    )
    min_actors: Positive = Field(1, description="Smallest number of actors. These always run.")
    max_actors: Positive | Literal["auto"] = Field(
        "auto",
        description="Largest number of actors. auto: as many as fit on the GPUs, or on the CPUs if "
        "there are no GPUs, including nodes that join later.",
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="Whether actors use GPUs. auto: if the cluster has any."
    )
    actors_per_gpu: int = Field(
        1,
        ge=1,
        le=100,
        description="Actors that share one GPU and its memory. Raise it if a small network leaves "
        "the GPU idle.",
    )

    @model_validator(mode="after")
    def _bounds(self) -> PoolSettings:
        if self.max_actors != "auto" and self.max_actors < self.min_actors:
            raise ValueError(
                f"max_actors ({self.max_actors}) cannot be less than min_actors ({self.min_actors})"
            )
        return self

    def images_at_once(self, gpu: bool, image_size: int) -> int:
        """Return `batch_size` as a number, for square images of `image_size` pixels a side."""
        if self.batch_size != "auto":
            return self.batch_size
        return min(2048, max(1, round(256 * (224 / image_size) ** 2))) if gpu else 64
