"""Settings of the gate that refuses keep-lists."""

from __future__ import annotations

from pydantic import Field

from raypipe.config.base import Settings


class TrustSettings(Settings):
    """When predicted scores are good enough to prune by."""

    min_spearman: float = Field(
        0.2,
        ge=-1,
        le=1,
        description="no keep-lists where the lower end of the fidelity's interval is below; -1: never refuse",
    )
