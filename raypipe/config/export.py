"""Settings of `raypipe export`. They are not a section of the configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raypipe.config.base import Positive, Settings

SHARD_FORMATS = ("webdataset", "parquet")
"""Formats that are folders of shards. The others are a single file."""
ExportFormat = Literal["indices", "list", "webdataset", "parquet"]


class ExportSettings(Settings):
    """Write the samples of a keep-list in a format that training tools read."""

    format: ExportFormat = Field(
        description="webdataset, parquet: a folder of shards with images. indices: row numbers "
        "(.npy, .json). list: paths and labels (.csv, .txt)."
    )
    to: str = Field(min_length=1, description="Path or URI of the folder or file to write.")
    keep: float | None = Field(
        None, description="Fraction of the keep-list, 0 to 1. Default: the only keep-list."
    )
    shard_samples: Positive | None = Field(
        None, description="Samples per shard. Default: as many as fit into shard_bytes."
    )
    shard_bytes: Positive | None = Field(
        None, description="Approximate size of a shard in bytes. Default: 512 MiB."
    )
    allow_missing: bool = Field(
        False, description="Succeed even if samples of the keep-list can no longer be read."
    )
    force: bool = Field(False, description="Replace another export in the same place.")
    snapshot: str | None = Field(
        None, description="Export the keep-list as it was in this snapshot of a nightly run."
    )

    @property
    def in_shards(self) -> bool:
        """Whether the export is a folder of shards."""
        return self.format in SHARD_FORMATS

    @model_validator(mode="after")
    def _single_file_without_shards(self) -> Self:
        if not self.in_shards and (self.shard_samples or self.shard_bytes):
            raise ValueError(
                f"format {self.format} is a single file, which has no shards; remove shard_samples "
                "and shard_bytes"
            )
        return self
