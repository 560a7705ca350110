"""Scheduled nights: what is measured of new samples, when a refresh is advised, how long snapshots are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raypipe.config.base import Positive, Settings


class NightlySettings(Settings):
    """Of jobs/nightly.py alone: judging what is new, and snapshots. See docs/nightly.md."""

    audit: Annotated[int, Field(ge=0)] = Field(
        200,
        description="new samples measured in a night, at most, to judge the fidelity of scores at checkpoints; 0: none",
    )
    drift_samples: int = Field(
        2000, ge=100, description="new and old samples, at most, that drift is measured on"
    )
    max_drift: float = Field(
        0.65,
        ge=0.5,
        le=1,
        description="a refresh is advised where new samples can be told from old ones better than this (lower end of the AUC's interval; "
        "0.5: not at all); 1: never",
    )
    max_new_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="a refresh is advised where more of the samples than this came after the seed set; 1: never",
    )
    keep_snapshots: Positive = Field(30, description="newest snapshots that are kept")
    keep_days: Positive | None = Field(
        90, description="older snapshots expire, but for the newest; null: never by age"
    )
    report: bool = Field(
        False, description="write the report as well, which reads all scores and some embeddings"
    )
