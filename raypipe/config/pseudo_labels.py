"""Labels from clusters, where the source has none."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.choices import PROXY_MODELS

TORCHVISION = "torchvision://"
"""Weights that torchvision publishes."""


class PseudoLabelSettings(Settings):
    """Labels from clusters, for a source without labels (`source.label_column: null`)."""

    clusters: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="how many clusters, about as many as there are classes; null: the source's own labels are used",
    )
    features: Literal["self-supervised", "backbone"] = Field(
        "self-supervised",
        description="what clusters are sought in: embeddings of the proxy's network after SimCLR on the seed set, or of a network that is there",
    )
    method: Literal["kmeans", "turtle"] = Field(
        "kmeans", description="spherical k-means, or labels that are easily learnt (TURTLE)"
    )
    model: str = Field("resnet50", description="backbone: torchvision network")
    weights: str | None = Field(
        None,
        min_length=1,
        description="backbone: its state dict, a safetensors file or URI; torchvision:// for the weights torchvision publishes",
    )
    image_size: int = Field(
        224,
        ge=32,
        le=1024,
        description="backbone: pixels, square, that decoded images are scaled to",
    )
    epochs: Positive = Field(100, description="self-supervised: passes over the seed set")
    batch_size: int = Field(256, ge=2, description="self-supervised: images per step")
    lr: float = Field(1e-3, gt=0, description="self-supervised: peak learning rate of AdamW")
    temperature: float = Field(
        0.5, gt=0, description="self-supervised: that of the contrastive loss"
    )
    restarts: Positive = Field(10, description="k-means: starts, of which the best is taken")
    iterations: Positive | Literal["auto"] = Field(
        "auto", description="rounds of k-means (auto: 100) or steps of TURTLE (auto: 1000)"
    )
    gamma: float = Field(10.0, ge=0, description="TURTLE: the larger, the more equal the clusters")
    seed: int = Field(0, ge=0, description="initial weights, views, starts of the clusters")

    @field_validator("model")
    @classmethod
    def _is_backbone(cls, value: str) -> str:
        known = [name for name in PROXY_MODELS if name != "small"]
        if value not in known:
            raise ValueError(f"not one of {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _weights_fit(self) -> PseudoLabelSettings:
        if self.features == "backbone" and self.weights is None:
            raise ValueError(
                f"features: backbone needs weights: a safetensors file, or {TORCHVISION} for those that torchvision publishes"
            )
        if self.features != "backbone" and self.weights is not None:
            raise ValueError(
                f"weights are given, but features are {self.features}; set features to backbone, or leave them out"
            )
        return self

    @property
    def rounds(self) -> int:
        """`iterations` as a number."""
        return (
            self.iterations
            if self.iterations != "auto"
            else 100
            if self.method == "kmeans"
            else 1000
        )
