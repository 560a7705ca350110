"""Settings of the source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.parts import OrPart, PartOptions, Reference, check_names
from raypipe.plugins import SOURCE

OwnFormat = Literal[
    "auto",
    "parquet",
    "imagefolder",
    "filelist",
    "webdataset",
    "tfrecord",
    "mds",
    "lance",
    "huggingface",
    "torchvision",
    "synthetic",
    "digits",
]
"""Formats that raypipe reads, and auto."""


class SourceSettings(Settings):
    """Source: the dataset as its owner stores it."""

    uri: str = Field(
        description="Folder, file, glob, brace pattern (shard-{000..127}.tar) or list of shards "
        "(.txt): local path, file://, s3://, gs:// or az://; Lance: NAME.lance or lance://. "
        "Datasets by name: digits:// (bundled), torchvision://CIFAR10, huggingface://user/name. "
        "synthetic:// generates images."
    )
    format: Annotated[str, OrPart(SOURCE, OwnFormat)] = Field(
        "auto",
        description="Storage format. auto: from the file names. module:Class names a source of "
        "your own.",
    )
    options: PartOptions = Field(
        {}, description="Options of sources from other packages: {name: {option: value}}."
    )
    root: str | None = Field(
        None,
        min_length=1,
        description="Folder of a torchvision dataset's files, or the folder that the paths of a "
        "file list are relative to.",
    )
    split: str | None = Field(
        None,
        min_length=1,
        description="Split of a dataset that has several. Default for torchvision: train.",
    )
    config_name: str | None = Field(
        None, min_length=1, description="Hugging Face: configuration of a dataset on the hub."
    )
    version: str | None = Field(
        None, min_length=1, description="Lance: version number or tag. Default: the newest version."
    )
    download: bool = Field(True, description="Download a torchvision dataset that is not in root.")
    verify: bool = Field(
        True, description="Verify a torchvision dataset's files against the published checksums."
    )
    include: str = Field(
        "*", min_length=1, description="Glob on the path below uri. Only matching files are read."
    )
    image_column: str = Field(
        "auto",
        min_length=1,
        description="Tables, MDS, TFRecord: column with the images. auto: image, img, ..., or the "
        "only candidate. WebDataset: extension of the member with the image, such as jpg or "
        "rgb.png. auto: the only one with an image's extension.",
    )
    label_column: str | None = Field(
        "auto",
        min_length=1,
        description="Column, or WebDataset .json field, with the label. auto: label, fine_label, "
        "class, ... null: the source has no labels, or they should be ignored (any format); see "
        "pseudo_labels.",
    )
    id_column: str | None = Field(
        None,
        min_length=1,
        description="Tables, MDS, TFRecord: column with unique ids. Default: file#row.",
    )
    path_column: str | None = Field(
        None,
        min_length=1,
        description="File list: column with the paths. Default: path, file, filename, file_name or "
        "image, otherwise the first.",
    )
    class_map: str | None = Field(
        None,
        min_length=1,
        description="Image folder, file list: file that maps folders or labels to classes, as "
        "JSON or text lines.",
    )
    num_classes: Positive | None = Field(
        None,
        description="Number of classes. Default: that of the source. A larger number adds classes "
        "without samples.",
    )
    limit: Positive | None = Field(
        None, description="Use only the first N samples, for a trial run."
    )
    inject_noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the samples whose label is replaced by another class, drawn by id, "
        "to test the detection of label noise. Never train on the lists of such a run.",
    )
    noise_seed: int = Field(
        0, ge=0, description="inject_noise: random seed. Another number changes other labels."
    )
    fragment_samples: Positive = Field(
        1024,
        description="Largest number of samples in one unit of work. Lower it to use less memory "
        "per worker, raise it for very large sources.",
    )
    transform: Reference | None = Field(
        None,
        description="Function of your own that turns each stored image into pixels, as "
        "module:function: it takes a PIL image, the array that the source yields, or bytes that "
        "Pillow cannot open, and returns uint8 [height, width] or [height, width, channels].",
    )
    max_pixels: Positive = Field(
        100_000_000, description="Images with more pixels are rejected, not decoded."
    )
    bit_depth: int = Field(
        16,
        ge=8,
        le=16,
        description="Bits that 16-bit greyscale images use. 12 for the values 0 to 4095 of many "
        "cameras and scanners. Images with larger values are rejected.",
    )
    max_reject_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of unreadable samples above which the run fails. Fewer than 10 never "
        "fail it. 0: no sample can be unreadable, 1: all can.",
    )

    @model_validator(mode="after")
    def _options_of_others(self) -> SourceSettings:
        check_names(self.options, OwnFormat, "source")
        return self
