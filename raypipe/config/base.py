"""Base class of all sections."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of every section: unknown keys are refused, values are fixed once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _paths_as_text(cls, data: Any) -> Any:
        """Accept `pathlib.Path` wherever a path is a string."""
        if not isinstance(data, dict):
            return data
        return {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in data.items()
        }
