"""Settings of the embedding pass."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raypipe.config.pool import PoolSettings


class EmbedSettings(PoolSettings):
    """Embed: one forward pass of the proxy over the whole source."""

    dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="Number format of stored embeddings. float16 halves their size.",
    )
    decode: Literal["cpu", "gpu", "auto"] = Field(
        "cpu",
        description="Where JPEGs are decoded. gpu: in batches on the actors' GPUs. auto: on GPUs "
        "if the cluster has any. Other images are always decoded on CPUs. GPU pixels differ by a "
        "few levels, so only cpu gives the same scores on every machine.",
    )
