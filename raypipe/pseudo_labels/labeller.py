"""Images to pseudo-labels: a network that gives features, and the rule that says which cluster these are in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raypipe.pseudo_labels.clusters import Clusters
from raypipe.vision.devices import AdaptiveBatch, to_device

BATCH_SIZE = 64
"""Images in one forward pass, on a GPU at most."""


def features(network: Any, images: Any, at_once: AdaptiveBatch, device: str = "cpu") -> np.ndarray:
    """What a network embeds images as: float32 [n, d].

    network  with `embed`, in eval mode on `device`
    images   pixels uint8 [n, 3, size, size], an array or a tensor
    """
    with torch.inference_mode():
        parts = at_once(lambda part: network.embed(to_device(part, device)).float(), images)
        return torch.cat(parts).cpu().numpy()


class Labeller:
    """A network in eval mode on its device, and clusters."""

    def __init__(self, network: Any, clusters: Clusters, device: str = "cpu") -> None:
        self._network, self._clusters, self._device, self._at_once = (
            network,
            clusters,
            device,
            AdaptiveBatch(BATCH_SIZE),
        )

    def __call__(self, images: Any) -> np.ndarray:
        """Pseudo-labels int64 [n] of images, as for `features`; -1 of those whose features are not finite."""
        found = features(self._network, images, self._at_once, self._device)
        return np.where(np.isfinite(found).all(1), self._clusters(np.nan_to_num(found)), -1)
