"""Settings of the gate that refuses keep-lists of low fidelity or stability."""

from __future__ import annotations

from pydantic import Field

from raypipe.config.base import Settings


class TrustSettings(Settings):
    """Trust: when predicted scores are good enough to prune by."""

    min_spearman: float = Field(
        0.2,
        ge=-1,
        le=1,
        description="Refuse keep-lists if the lower end of the fidelity's interval (Spearman) is "
        "below this. -1: never refuse.",
    )
    min_stability: float = Field(
        0.5,
        ge=-1,
        le=1,
        description="Refuse keep-lists if the lower end of the stability's interval is below this: "
        "another training would rank the samples differently. Stability is measured with "
        "proxy.cross_fit. -1: never refuse.",
    )
