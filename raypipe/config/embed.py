"""Settings of the embedding pass."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raypipe.config.pool import PoolSettings


class EmbedSettings(PoolSettings):
    """One forward pass over the whole source."""

    dtype: Literal["float32", "float16"] = Field("float32", description="how embeddings are stored")
    decode: Literal["cpu", "gpu", "auto"] = Field(
        "cpu",
        description="where JPEGs are decoded: gpu in batches on the actors' GPUs, other images as before; auto where there are any; pixels differ "
        "by a few levels, so that only cpu gives the same scores on every machine",
    )
