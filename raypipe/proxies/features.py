"""What the package knows about a network of `embed.model`, whichever library it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.proxies.weight_names import differences


@dataclass(frozen=True)
class Features:
    """Where features come from.

    Attributes
    ----------
    name : str
        As in `embed.model`.
    build : callable
        (image_size, channels, weights) -> float [n, channels, size, size] to [n, width].
        `weights` are "none", "pretrained", or a state dict.
    input_size : int, optional
        Side of the images, in pixels, that the network is made for; None if it states none.
    mean, std : tuple of float, optional
        Normalisation of the images that it is made for, per channel; None if it states none.
    width : int, optional
        Length of the embeddings, where it is known before the network is built.
    """

    name: str
    build: Callable[[int, int, str | Mapping[str, Tensor]], nn.Module]
    input_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    width: int | None = None


def load_whole(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Load all weights of a network. Raises ConfigError if they are those of another one."""
    resized = [
        key
        for key, value in module.state_dict().items()
        if key in weights and value.shape != weights[key].shape
    ]
    fitting = {key: value for key, value in weights.items() if key not in resized}
    missing, unexpected = module.load_state_dict(fitting, strict=False)
    missing = [key for key in missing if key not in resized]
    if found := differences(
        {"missing": missing, "of another shape": resized, "unexpected": unexpected}
    ):
        raise ConfigError(
            f"embed.weights: the file does not have the weights of {name}: {found}; set "
            "embed.model to the network that they belong to"
        )
