"""Image encoders of OpenCLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.proxies.features import Features, load_whole
from raypipe.proxies.registry import check_known
from raypipe.text import error_line


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            f"embed.model: networks of open_clip need the package ({error_line(error)}): "
            "pip install 'raypipe[open_clip]'"
        ) from None
    return open_clip


def features(name: str, rest: str) -> Features:
    """Return the image encoder of `NAME` or `NAME/TAG`; a tag is one of published weights."""
    open_clip = _open_clip()
    network, _, tag = rest.partition("/")
    check_known(f"open_clip:{network}", open_clip.list_models(), "embed.model")
    tags = open_clip.list_pretrained_tags_by_model(network)
    tag = tag or (tags[0] if tags else "")
    published = open_clip.get_pretrained_cfg(network, tag) if tag else {}

    def build(image_size: int, channels: int, weights: str | Mapping[str, Tensor]) -> nn.Module:
        if weights == "pretrained" and not published:
            raise ConfigError(
                f"embed.weights: open_clip publishes no weights {tag!r} for {network}; set "
                f"embed.model to open_clip:{network}/TAG with one of {', '.join(tags) or 'none'}, "
                "or embed.weights to a safetensors file"
            )
        given = tag if weights == "pretrained" else None
        try:
            model = open_clip.create_model(network, given, force_image_size=image_size)
        except Exception as error:  # no network, no space, a hub that refuses
            where = published.get("hf_hub") or published.get("url")
            raise ConfigError(
                f"embed.weights: the weights of {name} cannot be downloaded ({error_line(error)}); "
                f"put those of {where} in the cache of each node, or set embed.weights to a "
                "safetensors file with the state dict of the model"
            ) from None
        if not isinstance(weights, str):
            load_whole(model, weights, name)
        return _ImageEncoder(model)

    stated = open_clip.get_model_config(network)
    size = stated["vision_cfg"].get("image_size", 224)
    return Features(
        name,
        build,
        input_size=int(size[0] if isinstance(size, list | tuple) else size),
        mean=tuple(published.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(published.get("std") or open_clip.OPENAI_DATASET_STD),
        width=stated["embed_dim"],
    )


class _ImageEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)
