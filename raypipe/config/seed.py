"""Settings of the seed set and the audit set."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raypipe.config.base import Settings


class SeedSettings(Settings):
    """The randomly chosen few percent of samples that are scored by measurement."""

    fraction: float = Field(0.1, gt=0, le=1, description="share of the source that is measured")
    seed: int = Field(0, ge=0, description="another number draws another seed set")
    audit: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="samples outside the seed set that are measured directly to judge the fidelity of scores at checkpoints, about; "
        "auto: a tenth of the seed set, 50 to 500; 0: none",
    )

    def audit_samples(self, samples: int) -> int:
        """How many samples an audit set should have where the source has so many."""
        return (
            min(500, max(50, round(samples * self.fraction / 10)))
            if self.audit == "auto"
            else self.audit
        )
