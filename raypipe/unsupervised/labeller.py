"""Images to pseudo-labels: a network that gives features, and the rule that says which cluster these are in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raypipe.unsupervised.clusters import Clusters


def features(network: Any, images: Any, size: int, device: str = "cpu") -> np.ndarray:
    """What a network embeds images as: float32 [n, d].

    network  with `embed`, in eval mode on `device`
    images   pixels uint8 [n, 3, size, size], an array or a tensor; `size` at a time
    """
    parts: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, max(1, len(images)), size):
            pixels = torch.as_tensor(images[start : start + size]).to(device)
            parts.append(network.embed(pixels).float().cpu().numpy())
    return np.concatenate(parts)


class Labeller:
    """A network in eval mode on its device, and clusters."""

    def __init__(self, network: Any, clusters: Clusters, device: str = "cpu") -> None:
        self._network, self._clusters, self._device = network, clusters, device

    def __call__(self, images: Any, size: int) -> np.ndarray:
        """Pseudo-labels int64 [n] of images, as for `features`; -1 of those whose features are not finite."""
        found = features(self._network, images, size, self._device)
        return np.where(np.isfinite(found).all(1), self._clusters(np.nan_to_num(found)), -1)
