"""Features of a torchvision network with existing weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypipe.config.proxy import NORMALIZATIONS
from raypipe.errors import ConfigError


class Backbone(nn.Module):
    """A torchvision network without its last layer.

    Parameters
    ----------
    name : str
        One of `raypipe.config.choices.PROXY_MODELS` except "small".
    image_size : int
        Side in pixels to which images are scaled. Channels are normalised as for ImageNet.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, image_size: int) -> None:
        super().__init__()
        import torchvision

        self.network = torchvision.models.get_model(name, weights=None)
        self.network.fc = nn.Identity()
        self._name, self._size = name, image_size
        mean, std = NORMALIZATIONS["imagenet"]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def load_weights(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Load a state dict with torchvision's names, without the weights of the last layer.

        Parameters
        ----------
        weights : Mapping[str, Tensor]
            The state dict.
        where : str
            Where it comes from, for the message of the error.

        Raises
        ------
        ConfigError
            If the weights are not those of this network.
        """
        body = {name: value for name, value in weights.items() if not name.startswith("fc.")}
        own = self.network.state_dict()
        missing = sorted(
            name for name in own if name not in body and not name.endswith("num_batches_tracked")
        )
        wrong = sorted(
            name for name in body if name not in own or body[name].shape != own[name].shape
        )
        if missing or wrong:
            problem = (
                f"{len(missing)} missing, such as {missing[0]}"
                if missing
                else f"{len(wrong)} that do not fit, such as {wrong[0]}"
            )
            raise ConfigError(
                f"pseudo_labels.weights: {where} does not have the weights of torchvision's "
                f"{self._name} ({problem}); set pseudo_labels.model to the network they belong to, "
                "and name them as torchvision does"
            )
        self.network.load_state_dict(dict(body), strict=False)

    def embed(self, pixels: Tensor) -> Tensor:
        """Map uint8 [n, 3, size, size] to features, float [n, d]."""
        scaled = pixels.to(self.mean.dtype).div(255)
        if scaled.shape[-1] != self._size:
            scaled = F.interpolate(
                scaled, (self._size, self._size), mode="bilinear", antialias=True
            )
        return self.network((scaled - self.mean) / self.std)
