"""Settings of the seed set and the audit set."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raypipe.config.base import Settings


class SeedSettings(Settings):
    """Seed: the random few percent of the samples whose scores are measured."""

    fraction: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Share of the source that is measured, 0 to 1. More samples give better "
        "predictions and cost more training; the report's learning curve shows how much.",
    )
    seed: int = Field(0, ge=0, description="Random seed. Another number draws another seed set.")
    audit: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Approximate number of samples outside the seed set to measure, to assess "
        "the fidelity of scores at checkpoints. auto: a tenth of the seed set, 50 to 500. 0: none.",
    )

    def audit_samples(self, samples: int) -> int:
        """Return the target size of the audit set for a source of `samples` samples."""
        return (
            min(500, max(50, round(samples * self.fraction / 10)))
            if self.audit == "auto"
            else self.audit
        )
