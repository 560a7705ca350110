"""Settings of the Ray cluster."""

from __future__ import annotations

from pydantic import Field

from raypipe.config.base import Positive, Settings


class ClusterSettings(Settings):
    """How to reach Ray."""

    address: str = Field(
        "auto",
        min_length=1,
        description="auto: RAY_ADDRESS or the cluster a job runs in, else this machine alone; local: this machine",
    )
    patience_seconds: Positive = Field(
        600, description="a stage in which nothing moves for this long is stopped with an error"
    )
