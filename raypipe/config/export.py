"""Settings of `raypipe export`. They are not a section of the configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raypipe.config.base import Positive, Settings

SHARD_FORMATS = ("webdataset", "parquet", "huggingface", "croissant", "mds", "lance")
"""Formats that are folders of shards with the images of the kept samples."""
ALL_SAMPLES_FORMATS = ("fiftyone", "cleanlab", "label-studio")
"""Formats that describe all scored samples of a run, kept or not, without their images."""
ExportFormat = Literal[
    "indices",
    "list",
    "webdataset",
    "parquet",
    "huggingface",
    "croissant",
    "mds",
    "lance",
    "fiftyone",
    "cleanlab",
    "label-studio",
    "openlineage",
]


class ExportSettings(Settings):
    """Write the samples of a keep-list in a format that training tools read."""

    format: ExportFormat = Field(
        description="webdataset, parquet, huggingface, croissant, mds, lance: a folder of shards "
        "with images. indices: row numbers (.npy, .json). list: paths and labels (.csv, .txt). "
        "fiftyone: a folder that describes all samples. cleanlab: their label issues (.csv, "
        ".parquet). label-studio: likely label errors (.csv). openlineage: "
        "where the list comes from (.json)."
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
    push_to: str | None = Field(
        None,
        description="huggingface: name of a dataset on the Hugging Face Hub (user/name) to push "
        "the export to as well.",
    )
    image_root: str | None = Field(
        None,
        description="fiftyone, label-studio: path or URL that the paths of the images start with. "
        "After an http(s) URL, they are quoted. Default: the root of the source.",
    )
    allow_missing: bool = Field(
        False, description="Succeed even if samples of the keep-list can no longer be read."
    )
    force: bool = Field(
        False, description="Replace another export in the same place, or write next to other files."
    )
    snapshot: str | None = Field(
        None, description="Export the keep-list as it was in this snapshot of a nightly run."
    )

    @property
    def in_shards(self) -> bool:
        """Whether the export is a folder of shards."""
        return self.format in SHARD_FORMATS

    @property
    def of_all_samples(self) -> bool:
        """Whether the export describes all samples, kept or not."""
        return self.format in ALL_SAMPLES_FORMATS

    @model_validator(mode="after")
    def _options_of_other_formats(self) -> Self:
        if self.push_to is not None and self.format != "huggingface":
            raise ValueError(f"push_to needs format huggingface, not {self.format}")
        if self.image_root is not None and self.format not in ("fiftyone", "label-studio"):
            raise ValueError(f"image_root has no effect on format {self.format}; remove it")
        if self.snapshot is not None and self.of_all_samples:
            raise ValueError(
                f"format {self.format} describes the run as it is now; remove snapshot"
            )
        return self

    @model_validator(mode="after")
    def _single_file_without_shards(self) -> Self:
        if not self.in_shards and (self.shard_samples or self.shard_bytes):
            raise ValueError(
                f"format {self.format} has no shards; remove shard_samples and shard_bytes"
            )
        return self
