"""Image encoders of OpenCLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.proxies.downloads import from_hub
from raypipe.proxies.features import Features, load_whole
from raypipe.proxies.library_warnings import no_warnings
from raypipe.proxies.network import CHANNELS
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


def tag_of(rest: str) -> str:
    """Return the tag of the published weights of `NAME` or `NAME/TAG`; "" if there are none.

    Without a tag, it is the first that this version of the package lists.
    """
    network, _, tag = rest.partition("/")
    return tag or next(iter(_open_clip().list_pretrained_tags_by_model(network)), "")


def features(name: str, rest: str) -> Features:
    """Return the image encoder of `NAME` or `NAME/TAG`; a tag is one of published weights."""
    open_clip = _open_clip()
    network, tag = rest.partition("/")[0], tag_of(rest)
    check_known(f"open_clip:{network}", open_clip.list_models(), "embed.model")
    published = open_clip.get_pretrained_cfg(network, tag) if tag else {}
    # a file can be that of another tag than the first
    stated_tag = rest.partition("/")[2]

    def build(image_size: int, channels: int, weights: str | Mapping[str, Tensor]) -> nn.Module:
        if channels != CHANNELS:
            raise ConfigError(
                f"embed.model: {name} takes images with {CHANNELS} channels, not {channels}"
            )
        if weights == "pretrained" and not published:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(network)) or "none"
            raise ConfigError(
                f"embed.weights: open_clip publishes no weights {tag!r} for {network}; set "
                f"embed.model to open_clip:{network}/TAG with one of {tags}, or embed.weights to "
                "a safetensors file"
            )
        given = tag if weights == "pretrained" else None
        device = torch.get_default_device()
        activation = bool(published.get("quick_gelu")) and bool(given or stated_tag)
        try:
            with no_warnings(), from_hub():
                model = open_clip.create_model(
                    network,
                    given,
                    force_image_size=image_size,
                    force_quick_gelu=activation,
                    device=device,
                )
        except Exception as error:  # no network, a hub that refuses, a damaged file, a wrong size
            if given is None:
                raise ConfigError(
                    f"embed.model: {name} cannot be built for images of {image_size} pixels "
                    f"({error_line(error)}); set embed.image_size"
                ) from None
            raise ConfigError(
                f"embed.weights: the weights of {name} cannot be loaded ({error_line(error)}); "
                f"without a network, copy {_where(published)} to where each node reads it, set "
                f"embed.weights to its path and embed.model to open_clip:{network}/{tag}"
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


def _where(published: Mapping[str, Any]) -> str:
    """Return which file has the weights of a tag, as text."""
    repository, _, file = (published.get("hf_hub") or "").rpartition("/")
    if repository and not file:
        return f"open_clip_model.safetensors of https://huggingface.co/{repository}"
    source = f"{file} of https://huggingface.co/{repository}" if file else published.get("url")
    return f"the state dict of {source}, saved as a safetensors file,"


class _ImageEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)
