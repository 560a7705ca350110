"""Settings of the embedding pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from raypipe.config.choices import FEATURES_OF_PROXY, NO_NETWORK, is_features, unknown_features
from raypipe.config.pool import PoolSettings

if TYPE_CHECKING:
    _WithTable = PoolSettings
else:
    # `from` is a keyword of Python, so that it cannot be written as an attribute of a class
    _WithTable = create_model(
        "_WithTable",
        __base__=PoolSettings,
        **{
            "from": (
                str | None,
                Field(
                    None,
                    min_length=1,
                    description="Embeddings that you already have: path or URI of Parquet files "
                    "with sample_id and embedding. They are put next to those of embed.model; set "
                    "that to none to use them alone. A sample without one is a reject.",
                ),
            )
        },
    )


OF_NETWORK = ("weights", "image_size")
"""Settings that need a network in `embed.model`."""


class EmbedSettings(_WithTable):
    """Embed: one forward pass over the whole source, by the proxy and by embed.model."""

    model: str = Field(
        FEATURES_OF_PROXY,
        min_length=1,
        description="Network whose embeddings extrapolators and keep strategies see. proxy: the "
        "proxy. timm:NAME, torchvision:NAME, open_clip:NAME, transformers:NAME (DINOv2, SigLIP, "
        "...), or module:function, code of your own that returns one for (image_size, channels). "
        "none: only those of embed.from.",
    )
    weights: str = Field(
        "pretrained",
        min_length=1,
        description="Weights of embed.model. pretrained: those that its library publishes, through "
        "its own download and cache. Or the path or URI of a safetensors file with its state "
        "dict. none: as the network is built, at random for those of a library.",
    )
    image_size: Annotated[int, Field(ge=8, le=1024)] | Literal["auto"] = Field(
        "auto",
        description="Side in pixels of the square images that embed.model sees. auto: what it is "
        "made for, or proxy.image_size if it states nothing.",
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="Number format of stored embeddings. float16 halves their size.",
    )
    decode: Literal["cpu", "gpu", "auto"] = Field(
        "cpu",
        description="Where JPEGs are decoded. gpu: in batches on the actors' GPUs. auto: on GPUs "
        "if the cluster has any. Other images are always decoded on CPUs. GPU pixels differ by a "
        "few levels, so only cpu gives the same scores on every machine.",
    )

    @field_validator("model")
    @classmethod
    def _model_exists(cls, value: str) -> str:
        if not is_features(value):
            raise ValueError(unknown_features(value))
        return value

    @model_validator(mode="after")
    def _features_fit(self) -> EmbedSettings:
        if self.model == NO_NETWORK and self.table is None:
            raise ValueError("model: none leaves no embeddings; set embed.from to a table of them")
        for name in OF_NETWORK:
            default = type(self).model_fields[name].default
            if self.network is None and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: has an effect only with a network in embed.model, now {self.model}; "
                    "name a network there, or remove this setting"
                )
        if self.network is not None and self.decode == "gpu":
            raise ValueError("decode: images for embed.model are decoded on CPUs; set it to cpu")
        return self

    @property
    def table(self) -> str | None:
        """`embed.from`: the URI of embeddings that exist."""
        return vars(self).get("from")

    @property
    def network(self) -> str | None:
        """`embed.model`, unless it is the proxy or none."""
        return None if self.model in (FEATURES_OF_PROXY, NO_NETWORK) else self.model

    @property
    def uses_proxy(self) -> bool:
        """Whether extrapolators and keep strategies see the embeddings of the proxy."""
        return self.model == FEATURES_OF_PROXY

    @property
    def has_features(self) -> bool:
        """Whether they see embeddings that are not those of the proxy."""
        return not self.uses_proxy or self.table is not None

    def features_text(self) -> str:
        """Return in words whose embeddings are used, for the report."""
        names = ["the proxy" if self.uses_proxy else self.network, self.table]
        return " and ".join(filter(None, names))

    def of_features(self) -> dict[str, Any]:
        """Return the settings of features, for the fingerprint; nothing without features."""
        if not self.has_features:
            return {}
        return {"model": self.model, "image_size": self.image_size}
