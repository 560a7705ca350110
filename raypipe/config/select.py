"""Settings of keep-lists."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Settings
from raypipe.config.choices import (
    AUTO,
    CLASSWISE_STRATEGIES,
    CUTTING_STRATEGIES,
    RANDOM_STRATEGIES,
    StrategyChoice,
    StrategyName,
    strategy_summaries,
)
from raypipe.config.parts import PartOptions, check_names

KeepFraction = Annotated[float, Field(gt=0, le=1)]


class SelectSettings(Settings):
    """Select: keep-lists."""

    keep: tuple[KeepFraction, ...] = Field(
        (0.3, 0.5, 0.7, 0.9),
        min_length=1,
        description="Fractions of the samples to keep, 0 to 1. One keep-list each.",
    )
    strategy: StrategyChoice = Field(
        "auto",
        description="Strategy. auto: for each fraction the one that the pilot shows to be better "
        f"than random, else random within classes; {strategy_summaries()}. module:Class names one "
        "of your own. See the guide to keep-lists.",
    )
    options: PartOptions = Field(
        {},
        description="Options of strategies from other packages: {name: {option: value}}.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description=f"{', '.join(RANDOM_STRATEGIES)}: random seed. Another number draws other "
        "samples.",
    )
    easy_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="mixed: share of the list from the easy end. The rest is from the hard end.",
    )
    difficulty: Literal["auto", "score", "loss", "aum", "el2n"] = Field(
        "auto",
        description=f"mixed, {', '.join(CUTTING_STRATEGIES)}: whether a high score or a high loss "
        "of the proxy means hard. aum: a low margin of the proxies that were not trained on the "
        "sample. el2n: a high EL2N, where it is the run's score. "
        "auto: the score if it measures difficulty (aum, el2n, entropy, forgetting, grand, loss), "
        "otherwise the loss.",
    )
    hard_cutoff: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto",
        description=f"{', '.join(CUTTING_STRATEGIES)}: share of hardest samples that is removed "
        "first. auto: half of what is pruned.",
    )
    strata: int = Field(
        50,
        ge=1,
        le=10_000,
        description="ccs, coverage: number of score intervals of equal width.",
    )
    beta_exponent: float = Field(
        4.0,
        gt=0,
        description="beta: exponent c_D. The higher, the more has to be pruned before easy "
        "samples are preferred.",
    )
    by_class: bool | Literal["auto"] = Field(
        "auto",
        description="Apply the strategy within each class, so that every class keeps the same "
        f"share (balanced: always). auto: with {', '.join(CLASSWISE_STRATEGIES)}, with strategy "
        "auto, and with quotas other than proportional.",
    )
    quotas: Literal["proportional", "equal", "recall"] = Field(
        "proportional",
        description="Share of each class, where the strategy is applied within classes. "
        "proportional: the same share of every class. equal: the same number of samples of every "
        "class, or all it has. recall: the more, the lower the recall of proxies that were not "
        "trained on the samples (DRoP).",
    )
    min_per_class: int = Field(
        0,
        ge=0,
        description="Minimum number of samples to keep of each class, or all if it has fewer.",
    )
    always_keep: str | None = Field(
        None,
        min_length=1,
        description="File of sample ids that every list contains: text with one id per line, or "
        "Parquet with a column sample_id.",
    )
    never_keep: str | None = Field(
        None,
        min_length=1,
        description="File of sample ids that no list contains, in a format of always_keep.",
    )
    near_duplicates: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Samples whose embeddings have at least this cosine similarity count as "
        "near-duplicates, and only the one with the highest score is kept. null: keep all.",
    )
    weights: Literal["none", "inclusion", "class"] = Field(
        "none",
        description="Training weights in the list. inclusion: inverse probability of being drawn "
        f"({', '.join(RANDOM_STRATEGIES)}). class: restores the class frequencies of the source.",
    )
    force: bool = Field(
        False, description="Write keep-lists even if the fidelity is below trust.min_spearman."
    )

    @property
    def within_classes(self) -> bool:
        """`by_class` as a bool."""
        if self.by_class == "auto":
            return self.strategy in (AUTO, *CLASSWISE_STRATEGIES) or self.quotas != "proportional"
        return self.by_class

    @property
    def cuts_within_classes(self) -> bool:
        """Whether keep-lists compare samples of the same class only."""
        return self.within_classes or self.strategy == "balanced"

    @field_validator("keep", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits(self) -> SelectSettings:
        check_names(self.options, StrategyName, "select")
        if (
            self.strategy in CUTTING_STRATEGIES
            and self.hard_cutoff != "auto"
            and max(self.keep) + self.hard_cutoff > 1 + 1e-9
        ):
            raise ValueError(
                f"keep ({max(self.keep)}) plus hard_cutoff ({self.hard_cutoff}) of {self.strategy} "
                "cannot be more than 1"
            )
        if self.quotas != "proportional" and not self.cuts_within_classes:
            raise ValueError(
                f"quotas: {self.quotas} divides the list among classes, but by_class is false; set "
                "by_class: auto"
            )
        if self.weights == "inclusion" and self.strategy not in (AUTO, *RANDOM_STRATEGIES):
            raise ValueError(
                "weights: inclusion is for strategies that draw "
                f"({', '.join(RANDOM_STRATEGIES)}), not {self.strategy}; use class"
            )
        if self.weights == "inclusion" and self.min_per_class:
            raise ValueError(
                "weights: inclusion does not hold with min_per_class, which changes the "
                "probabilities; use class"
            )
        return self
