"""Where the samples are, and which of them are measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raypipe.config.base import Positive, Settings


class SourceSettings(Settings):
    """The dataset as its owner stores it."""

    uri: str = Field(
        description="folder, file, glob, brace pattern (shard-{000..127}.tar) or list of shards (.txt); local path, file:// or s3://; "
        "digits:// is the bundled set; torchvision://CIFAR10, huggingface://user/name a dataset by name; synthetic:// made-up images"
    )
    format: Literal[
        "auto",
        "parquet",
        "imagefolder",
        "filelist",
        "webdataset",
        "huggingface",
        "torchvision",
        "synthetic",
        "digits",
    ] = Field("auto", description="auto looks at the file names")
    root: str | None = Field(
        None,
        min_length=1,
        description="folder of a torchvision dataset's files, or below which the paths of a file list are",
    )
    split: str | None = Field(
        None,
        min_length=1,
        description="which split of a dataset that has several; of a torchvision dataset train, if not given",
    )
    config_name: str | None = Field(
        None, min_length=1, description="Hugging Face: which configuration of a dataset of the hub"
    )
    download: bool = Field(True, description="fetch a torchvision dataset that is not in root")
    verify: bool = Field(
        True, description="check a torchvision dataset's files against the published checksums"
    )
    include: str = Field(
        "*", min_length=1, description="glob on the path below uri: only matching files are read"
    )
    image_column: str = Field(
        "auto",
        min_length=1,
        description="Parquet, Hugging Face: column with the images; auto: image, img, ..., or the only one",
    )
    label_column: str | None = Field(
        "auto",
        min_length=1,
        description="column, or WebDataset .json field, with the label; auto: label, fine_label, class, ...; null: there are no labels, or they "
        "are not to be read, in any format: see pseudo_labels",
    )
    id_column: str | None = Field(
        None,
        min_length=1,
        description="Parquet, Hugging Face: column with unique ids; default is file#row",
    )
    path_column: str | None = Field(
        None,
        min_length=1,
        description="file list: column with the paths; default: path, file, filename or image, else the first",
    )
    class_map: str | None = Field(
        None,
        min_length=1,
        description="image folder, file list: file that says which class a folder or label is; JSON or text lines",
    )
    num_classes: Positive | None = Field(
        None,
        description="default: found in the source; more than it names: the others have no samples",
    )
    limit: Positive | None = Field(None, description="use only the first N samples (rehearsals)")
    inject_noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="rehearsals: share of the samples whose label is replaced by another class, drawn by id; never train on such a run's lists",
    )
    noise_seed: int = Field(
        0, ge=0, description="inject_noise: another number replaces the labels of others"
    )
    fragment_samples: Positive = Field(1024, description="most samples in one unit of work")
    max_pixels: Positive = Field(
        100_000_000, description="an image with more pixels is rejected, not decoded"
    )
    max_reject_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="a run stops when more of its samples than this cannot be read; fewer than 10 never stop it; 0: none may, 1: all may",
    )
