"""Vision networks of transformers: DINOv2, DINOv3, SigLIP, CLIP, ViT and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.proxies.features import Features, load_whole
from raypipe.text import error_line

FILES = "config.json, model.safetensors and preprocessor_config.json"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"embed.model: networks of transformers need the package ({error_line(error)}): "
            "pip install 'raypipe[transformers]'"
        ) from None
    return transformers


def _unavailable(name: str, rest: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"embed.model: {name} cannot be loaded ({error_line(error)}); without a network, put the "
        f"{FILES} of {rest} into a folder of each node and set embed.model to transformers:FOLDER"
    )


def features(name: str, rest: str) -> Features:
    """Return the vision network of a model: `rest` is its name, or a folder with its files."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(rest, trust_remote_code=False)
        stated, _ = (
            transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(rest)
        )
    except (OSError, ValueError) as error:
        raise _unavailable(name, rest, error) from None

    def build(image_size: int, channels: int, weights: str | Mapping[str, Tensor]) -> nn.Module:
        try:
            if weights == "pretrained":
                model = transformers.AutoModel.from_pretrained(rest, trust_remote_code=False)
            else:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise _unavailable(name, rest, error) from None
        if not isinstance(weights, str):
            load_whole(model, weights, name)
        return _Pooled(getattr(model, "vision_model", model))

    size = stated.get("crop_size") or stated.get("size") or {}
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    mean, std = stated.get("image_mean"), stated.get("image_std")
    return Features(
        name,
        build,
        input_size=int(sides[0]) if sides else getattr(config, "image_size", None),
        mean=tuple(mean) if mean else None,
        std=tuple(std) if std else None,
        width=getattr(getattr(config, "vision_config", config), "hidden_size", None),
    )


class _Pooled(nn.Module):
    """The pooled output of a vision network, or the mean over its positions without one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        return output.last_hidden_state.mean(1)
