"""Vision networks of transformers: DINOv2, DINOv3, SigLIP, CLIP, ViT and others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.proxies.downloads import from_hub
from raypipe.proxies.features import Features, load_whole
from raypipe.proxies.library_warnings import no_warnings
from raypipe.proxies.weight_names import differences
from raypipe.text import error_line

FILES = "config.json, model.safetensors and preprocessor_config.json"
SUFFIXES = (".json", ".safetensors", ".bin")
"""Of the files of a model that are read: settings, and weights."""
POOLER = "pooler."
"""Start of the names of a layer that checkpoints of classifiers lack."""


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"embed.model: networks of transformers need the package ({error_line(error)}): "
            "pip install 'raypipe[transformers]'"
        ) from None
    return transformers


def identity_of_folder(rest: str) -> str:
    """Return a hash of the files of a model in a folder; "" for the name of a published model."""
    if not os.path.isdir(rest):
        return ""
    result = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(rest).iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
            result.update(f"{path.name}\0{content}\n".encode())
    return result.hexdigest()


@contextmanager
def _loading(rest: str) -> Iterator[None]:
    """Let transformers load files of a folder or of the hub, without progress bars and reports."""
    bars = _transformers().utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with no_warnings(), nullcontext() if os.path.isdir(rest) else from_hub():
            yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _unavailable(name: str, rest: str, error: BaseException) -> ConfigError:
    if rest.startswith(("/", ".")) and not os.path.exists(rest):
        return ConfigError(f"embed.model: {name}: no such folder")
    if os.path.isdir(rest):
        remedy = f"put the {FILES} of the model into the folder, on each node"
    else:
        remedy = (
            f"without a network, put the {FILES} of {rest} into a folder of each node and set "
            "embed.model to transformers:FOLDER"
        )
    return ConfigError(f"embed.model: {name} cannot be loaded ({error_line(error)}); {remedy}")


def features(name: str, rest: str) -> Features:
    """Return the vision network of a model: `rest` is its name, or a folder with its files."""
    transformers = _transformers()
    mixin = transformers.image_processing_base.ImageProcessingMixin
    try:
        with _loading(rest):
            config = transformers.AutoConfig.from_pretrained(rest, trust_remote_code=False)
            stated, _ = mixin.get_image_processor_dict(rest)
    except (OSError, ValueError) as error:
        raise _unavailable(name, rest, error) from None

    def build(image_size: int, channels: int, weights: str | Mapping[str, Tensor]) -> nn.Module:
        loading: dict[str, Any] = {}
        try:
            if weights == "pretrained":
                with _loading(rest):
                    model, loading = transformers.AutoModel.from_pretrained(
                        rest,
                        trust_remote_code=False,
                        output_loading_info=True,
                        ignore_mismatched_sizes=True,  # refused below, with their names
                    )
            else:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        except Exception as error:  # no network, no such file, a damaged one, weights of another
            raise _unavailable(name, rest, error) from None
        if not isinstance(weights, str):
            load_whole(model, weights, name)
        vision = getattr(model, "vision_model", model)
        prefix = "" if vision is model else "vision_model."
        return _Pooled(vision, pooled=_has_weights(name, loading, prefix))

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


def _has_weights(name: str, loading: Mapping[str, Any], prefix: str) -> bool:
    """Return whether the pooling layer of a vision network has weights, too.

    Raises
    ------
    ConfigError
        If another layer lacks weights. Those for other layers are allowed: a text network, a
        classifier.
    """
    missing, resized = (
        sorted(key.removeprefix(prefix) for key in keys if key.startswith(prefix))
        for keys in (
            loading.get("missing_keys", ()),
            [key for key, *_ in loading.get("mismatched_keys", ())],
        )
    )
    lacking = [key for key in missing if not key.startswith(POOLER)]
    if lacking or resized:
        unexpected = sorted(loading["unexpected_keys"])
        found = {"missing": lacking, "of another shape": resized, "unexpected": unexpected}
        raise ConfigError(
            f"embed.model: the weights of {name} are those of another network: "
            f"{differences(found)}; use config.json and weights of the same model"
        )
    return not missing


class _Pooled(nn.Module):
    """The pooled output of a vision network, or the mean over its positions without one.

    `pooled` is false if the weights of the pooling layer would be random ones.
    """

    def __init__(self, model: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.model, self._pooled = model, pooled

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self._pooled:
            return pooled.flatten(1)
        return output.last_hidden_state.mean(1)
