"""Settings of pseudo-labels, for sources without labels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raypipe.config.base import Positive, Settings
from raypipe.config.choices import PROXY_MODELS

TORCHVISION = "torchvision://"
"""URI of the weights that torchvision publishes."""


class PseudoLabelSettings(Settings):
    """Pseudo-labels: clusters as labels of an unlabelled source (`source.label_column: null`)."""

    clusters: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Number of clusters, about the number of classes you expect. null: use the "
        "labels of the source.",
    )
    features: Literal["self-supervised", "backbone"] = Field(
        "self-supervised",
        description="Embeddings to cluster. self-supervised: of the proxy's network after SimCLR "
        "on the seed set. backbone: of an existing network.",
    )
    method: Literal["kmeans", "turtle"] = Field(
        "kmeans",
        description="Clustering. kmeans: spherical k-means. turtle: labels that are easy to learn "
        "(TURTLE).",
    )
    model: str = Field("resnet50", description="backbone: torchvision network.")
    weights: str | None = Field(
        None,
        min_length=1,
        description="backbone: path or URI of a safetensors file with its state dict, or "
        "torchvision:// for the weights that torchvision publishes.",
    )
    image_size: int = Field(
        224,
        ge=32,
        le=1024,
        description="backbone: side in pixels that images are scaled to, square.",
    )
    epochs: Positive = Field(100, description="self-supervised: passes over the seed set.")
    batch_size: int = Field(256, ge=2, description="self-supervised: images per step.")
    lr: float = Field(1e-3, gt=0, description="self-supervised: peak learning rate of AdamW.")
    temperature: float = Field(
        0.5, gt=0, description="self-supervised: temperature of the contrastive loss."
    )
    restarts: Positive = Field(
        10, description="kmeans: number of restarts. The best result is used."
    )
    iterations: Positive | Literal["auto"] = Field(
        "auto", description="Iterations of kmeans (auto: 100) or steps of turtle (auto: 1000)."
    )
    gamma: float = Field(
        10.0,
        ge=0,
        description="turtle: weight of balance. Larger values give more equal cluster sizes.",
    )
    seed: int = Field(
        0, ge=0, description="Random seed of initial weights, augmented views and cluster starts."
    )

    @field_validator("model")
    @classmethod
    def _is_backbone(cls, value: str) -> str:
        backbones = [name for name in PROXY_MODELS if name != "small"]
        if value not in backbones:
            raise ValueError(f"not one of {', '.join(backbones)}")
        return value

    @model_validator(mode="after")
    def _weights_fit(self) -> PseudoLabelSettings:
        if self.features == "backbone" and self.weights is None:
            raise ValueError(
                f"features: backbone needs weights: a safetensors file, or {TORCHVISION} for the "
                "weights that torchvision publishes"
            )
        if self.features != "backbone" and self.weights is not None:
            raise ValueError(
                f"weights are given, but features are {self.features}; set features to backbone, "
                "or remove weights"
            )
        return self

    @property
    def rounds(self) -> int:
        """`iterations` as a number."""
        if self.iterations != "auto":
            return self.iterations
        return 100 if self.method == "kmeans" else 1000
