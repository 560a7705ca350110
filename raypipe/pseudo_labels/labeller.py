"""Map images to pseudo-labels, with a network that computes features and a rule for clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from raypipe.pseudo_labels.clusters import Clusters
from raypipe.vision.devices import AdaptiveBatch, padded, to_device


class FeatureNetwork(Protocol):
    """A network whose `embed` maps uint8 [n, 3, size, size] to features, float [n, d]."""

    @property
    def embed(self) -> Callable[[torch.Tensor], torch.Tensor]: ...


BATCH_SIZE = 64
"""Images in one forward pass; fewer if a GPU runs out of memory."""


def features(
    network: FeatureNetwork,
    images: np.ndarray | torch.Tensor,
    batched: AdaptiveBatch,
    device: str = "cpu",
) -> np.ndarray:
    """Return the network's features of images, float32 [n, d].

    Parameters
    ----------
    network : FeatureNetwork
        In eval mode, on `device`.
    images : np.ndarray or Tensor
        Pixels, uint8 [n, 3, size, size].
    batched : AdaptiveBatch
        Decides how many images go through the network at a time.
    device : str
        Device of the network.

    Notes
    -----
    On a CPU all batches have the same size, so that the features of an image do not depend on the
    other images, bit for bit.
    """
    on_cpu = torch.device(device).type == "cpu"

    def embed(part: np.ndarray | torch.Tensor) -> torch.Tensor:
        pixels = padded(part, batched.size) if on_cpu else part
        return network.embed(to_device(pixels, device)).float()[: len(part)]

    with torch.inference_mode():
        return torch.cat(batched(embed, images)).cpu().numpy()


class Labeller:
    """Assigns pseudo-labels to images.

    Parameters
    ----------
    network : FeatureNetwork
        In eval mode, on `device`.
    clusters : Clusters
        The clusters of its features.
    device : str
        Device of the network.
    """

    def __init__(self, network: FeatureNetwork, clusters: Clusters, device: str = "cpu") -> None:
        self._network, self._clusters, self._device = network, clusters, device
        self._batched = AdaptiveBatch(BATCH_SIZE)

    def __call__(self, images: np.ndarray | torch.Tensor) -> np.ndarray:
        """Return pseudo-labels of images, int64 [n]; -1 where features are not finite."""
        values = features(self._network, images, self._batched, self._device)
        labels = self._clusters(np.nan_to_num(values))
        return np.where(np.isfinite(values).all(1), labels, -1)
