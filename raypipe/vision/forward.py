"""Forward pass of a proxy: the embedding of each image, and statistics of the prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from raypipe.config.choices import PROXY_STATISTICS
from raypipe.vision.devices import AdaptiveBatch, padded, to_device
from raypipe.vision.output_statistics import output_statistics

CPU_BATCH = 32
"""Images in each forward pass on a CPU, where more are not faster. The last batch is padded."""


class EmbeddingModel(Protocol):
    """The part of a proxy that `forward` needs; `raypipe.proxies.networks.ProxyNet` has it."""

    @property
    def embed(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    @property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]: ...


def forward(
    model: EmbeddingModel,
    images: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    batched: AdaptiveBatch,
    device: str,
    amp: bool,
    probabilities: bool = False,
) -> dict[str, np.ndarray]:
    """Return the embedding and the prediction statistics of every image.

    Parameters
    ----------
    model : EmbeddingModel
        The proxy, or anything with its `embed` and `head`.
    images : np.ndarray or Tensor
        Pixels, uint8 [n, 3, size, size].
    labels : np.ndarray
        Int [n]; -1 for unlabelled samples. Their loss and margin are those of the predicted class.
    batched : AdaptiveBatch
        Decides how many images go through the network at a time.
    device : str
        Device of the model.
    amp : bool
        Use bfloat16 where that is safe.
    probabilities : bool
        Return the class probabilities as well.

    Returns
    -------
    dict[str, np.ndarray]
        embedding [n, d]; prediction, confidence, loss, margin, entropy [n]; and if requested
        probabilities [n, classes].

    Notes
    -----
    The CPU waits for the GPU once, at the end: until then all outputs stay on the GPU.

    On a CPU the outputs of an image do not depend on the other images, bit for bit: all batches
    have the same size.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        batched = AdaptiveBatch(min(CPU_BATCH, batched.size))

    def outputs(images: Any, labels: np.ndarray) -> dict[str, torch.Tensor]:
        count = len(labels)
        rows = batched.size if on_cpu else count
        embedding = model.embed(to_device(padded(images, rows), device))
        logits = model.head(embedding).float()
        prediction = logits.argmax(1)
        target = to_device(padded(labels.astype(np.int64), rows), device)
        statistics = output_statistics(logits, torch.where(target < 0, prediction, target))
        classes = {"probabilities": logits.softmax(1)} if probabilities else {}
        values = {
            "embedding": embedding.float(),
            "prediction": prediction.int(),
            "confidence": logits.softmax(1).amax(1),
            **{name: statistics[name] for name in PROXY_STATISTICS},
            **classes,
        }
        return {name: value[:count] for name, value in values.items()}

    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        parts = batched(outputs, images, labels)
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def embed(
    network: Callable[[torch.Tensor], torch.Tensor],
    images: np.ndarray | torch.Tensor,
    batched: AdaptiveBatch,
    device: str,
    amp: bool,
) -> np.ndarray:
    """Return the embedding of every image, float32 [n, d], by a network without a last layer.

    Images, batches and precision are as in `forward`.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        batched = AdaptiveBatch(min(CPU_BATCH, batched.size))

    def outputs(images: Any) -> torch.Tensor:
        rows = batched.size if on_cpu else len(images)
        return network(to_device(padded(images, rows), device))[: len(images)].float()

    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        return torch.cat(batched(outputs, images)).cpu().numpy()
