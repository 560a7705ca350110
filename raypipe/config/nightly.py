"""Settings of nightly runs: what is measured, when to advise a refresh, what snapshots to keep."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raypipe.config.base import Positive, Settings


class NightlySettings(Settings):
    """Nightly (jobs/nightly.py only): assess new samples, keep snapshots. See the nightly guide."""

    audit: Annotated[int, Field(ge=0)] = Field(
        200,
        description="Largest number of new samples measured per night, to assess the fidelity of "
        "scores at checkpoints. 0: none.",
    )
    drift_samples: int = Field(
        2000,
        ge=100,
        description="Largest number of new and of old samples that drift is measured on.",
    )
    max_drift: float = Field(
        0.65,
        ge=0.5,
        le=1,
        description="Advise a refresh if a classifier distinguishes new samples from old ones "
        "better than this (lower end of the AUC's interval; 0.5 is chance). 1: never.",
    )
    max_new_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Advise a refresh if more than this share of the samples arrived after the "
        "seed set was drawn. 1: never.",
    )
    keep_snapshots: Positive = Field(30, description="Number of newest snapshots to keep.")
    keep_days: Positive | None = Field(
        90, description="Days after which snapshots expire, except the newest. null: never by age."
    )
    report: bool = Field(
        False, description="Also write the report. It reads all scores and some embeddings."
    )
