"""Load the proxy from its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe import storage
from raypipe.runs.manifests import ProxyManifest
from raypipe.runs.partition import proxy_parts
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from raypipe.proxies.networks import ProxyNet


def load_checkpoint(
    run: Run, file: str, device: str = "cpu", folder: str = "proxy/checkpoints"
) -> ProxyNet:
    """Return the proxy with the weights of a checkpoint, in eval mode, in channels-last layout."""
    import torch
    from safetensors.torch import load

    model = empty_proxy(run)
    model.load_state_dict(load(storage.read_bytes(run.path(folder, file))))
    # the stubs of torch lack this combination of arguments
    return model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def last_layer(run: Run, proxies: Sequence[int] = (0,)) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of the layer from embeddings to logits.

    From the embeddings by several proxies, side by side, it gives the mean of their logits.

    Parameters
    ----------
    run : Run
        The run.
    proxies : sequence of int
        Numbers of the proxies that the embeddings come from.

    Returns
    -------
    weight, bias : numpy.ndarray
        float32 [classes, d] and float32 [classes]; d is the width of all embeddings together.
    """
    from safetensors.numpy import load

    trained, weights, biases = proxy_parts(run), [], []
    for part in (trained[proxy] for proxy in proxies):
        tensors = load(storage.read_bytes(run.path(part.checkpoints, part.trained.final)))
        weights.append(tensors["head.weight"] / len(proxies))
        biases.append(tensors["head.bias"] / len(proxies))
    return np.concatenate(weights, 1), np.sum(biases, 0)


def empty_proxy(run: Run) -> ProxyNet:
    """Return the proxy's network with arbitrary weights."""
    import torch

    from raypipe.proxies.networks import build_network

    manifest = ProxyManifest.read(run)
    with torch.random.fork_rng(devices=[]):
        return build_network(
            manifest.model,
            manifest.classes,
            manifest.image_size,
            manifest.mean,
            manifest.std,
        ).hold(manifest.freeze, manifest.train)
