"""Settings of keep-lists."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Settings
from raypipe.config.choices import RANDOM_STRATEGIES, StrategyName, strategy_summaries

KeepFraction = Annotated[float, Field(gt=0, le=1)]


class SelectSettings(Settings):
    """Keep-lists."""

    keep: tuple[KeepFraction, ...] = Field(
        (0.3, 0.5, 0.7, 0.9), min_length=1, description="fractions of the samples to keep"
    )
    strategy: StrategyName = Field(
        "ccs", description=f"{strategy_summaries()}. See docs/keep-lists.md"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="random, ccs, beta: another number draws other samples"
    )
    easy_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="mixed: share of the list from the easy end, the rest from the hard end",
    )
    difficulty: Literal["auto", "score", "loss"] = Field(
        "auto",
        description="mixed, ccs: what is hard, a high score or a high loss of the proxy; auto: the score where it is one of difficulty "
        "(aum, el2n, entropy, forgetting, grand, loss), else the loss",
    )
    hard_cutoff: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto",
        description="ccs: share of the samples, the hardest, that is left out first; auto: half of what is pruned",
    )
    strata: int = Field(
        50, ge=1, le=10_000, description="ccs: intervals of equal width of the score"
    )
    beta_exponent: float = Field(
        4.0, gt=0, description="beta: c_D; the higher, the later easy samples are preferred"
    )
    by_class: bool | Literal["auto"] = Field(
        "auto",
        description="the strategy works within each class, and every class keeps the same share (balanced: always); auto: with ccs",
    )
    min_per_class: int = Field(
        0, ge=0, description="samples each class keeps at least, or all it has"
    )
    always_keep: str | None = Field(
        None,
        min_length=1,
        description="ids in every list: text, one a line, or Parquet with sample_id",
    )
    never_keep: str | None = Field(None, min_length=1, description="ids in no list, as always_keep")
    near_duplicates: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of embeddings with at least this cosine similarity only that of the highest score is kept",
    )
    weights: Literal["none", "inclusion", "class"] = Field(
        "none",
        description="column of training weights; inclusion: inverse probability of being drawn (random, ccs, beta); class: class "
        "frequencies of the source",
    )
    force: bool = Field(
        False, description="make keep-lists even where the fidelity is below trust.min_spearman"
    )

    @property
    def within_classes(self) -> bool:
        """`by_class` as it is meant."""
        return self.strategy == "ccs" if self.by_class == "auto" else self.by_class

    @field_validator("keep", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits(self) -> SelectSettings:
        if (
            self.strategy == "ccs"
            and self.hard_cutoff != "auto"
            and max(self.keep) + self.hard_cutoff > 1 + 1e-9
        ):
            raise ValueError(
                f"keep ({max(self.keep)}) and hard_cutoff ({self.hard_cutoff}) of ccs cannot be more than 1 together"
            )
        if self.weights == "inclusion" and self.strategy not in RANDOM_STRATEGIES:
            raise ValueError(
                "weights: inclusion is for strategies that draw "
                f"({', '.join(RANDOM_STRATEGIES)}), not {self.strategy}; use class"
            )
        if self.weights == "inclusion" and self.min_per_class:
            raise ValueError(
                "weights: inclusion does not hold with min_per_class, which changes the probabilities; use class"
            )
        return self
