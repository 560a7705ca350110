"""Settings of the gate that refuses keep-lists whose scores cannot be trusted."""

from __future__ import annotations

from pydantic import Field

from raypipe.config.base import Settings
from raypipe.text import MIN_ACCURACY_OVER_CHANCE


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
    min_accuracy_over_chance: float = Field(
        MIN_ACCURACY_OVER_CHANCE,
        ge=-1,
        le=1,
        description="Refuse keep-lists if the proxy hardly beats chance on samples it was not "
        "trained on: its accuracy must have come at least this share of the way from chance to 1, "
        "and be two standard errors above chance. Chance is the share of the largest class, or one "
        "divided by the number of classes for the mean accuracy over classes; one of the two is "
        "enough. -1: never refuse.",
    )
