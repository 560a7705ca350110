"""Load the proxy from its checkpoints."""

from __future__ import annotations

from typing import Any

from raypipe import storage
from raypipe.runs.manifests import ProxyManifest
from raypipe.runs.partition import proxy_parts
from raypipe.runs.run import Run


def load_checkpoint(
    run: Run, file: str, device: str = "cpu", folder: str = "proxy/checkpoints"
) -> Any:
    """The proxy with the weights of a checkpoint, in eval mode, laid out as convolutions are fastest."""
    import torch
    from safetensors.torch import load

    model = empty_proxy(run)
    model.load_state_dict(load(storage.read_bytes(run.path(folder, file))))
    return model.to(device=device, memory_format=torch.channels_last).eval()


def last_layer(run: Run) -> tuple[Any, Any]:
    """Weight float32 [classes, d] and bias float32 [classes] of the layer that makes logits of embeddings."""
    from safetensors.numpy import load

    part = proxy_parts(run)[0]  # the one that all samples are embedded by
    weights = load(storage.read_bytes(run.path(part.checkpoints, part.trained.final)))
    return weights["head.weight"], weights["head.bias"]


def empty_proxy(run: Run) -> Any:
    """The proxy's network with weights that mean nothing."""
    import torch

    from raypipe.vision.networks import build_network

    manifest = ProxyManifest.read(run)
    with torch.random.fork_rng(devices=[]):
        return build_network(
            manifest.model,
            manifest.classes,
            manifest.image_size,
            manifest.mean,
            manifest.std,
        )
