"""What a proxy makes of images: the embedding, and what it says of each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raypipe.config.choices import PROXY_STATISTICS
from raypipe.vision.devices import AdaptiveBatch, to_device
from raypipe.vision.output_statistics import numbers


def forward(
    model: Any, images: Any, labels: np.ndarray, at_once: AdaptiveBatch, device: str, amp: bool
) -> dict[str, np.ndarray]:
    """What a proxy makes of images: embedding [n, d]; prediction, confidence, loss, margin, entropy [n].

    images  pixels uint8 [n, 3, size, size], an array or a tensor;  amp  in bfloat16 where it is safe
    Loss and margin of an unlabelled sample, label -1, are those of the predicted class.
    A GPU is waited for once, at the end: until then what comes out stays there.
    """

    def outputs(images: Any, labels: np.ndarray) -> dict[str, torch.Tensor]:
        embedding = model.embed(to_device(images, device))
        logits = model.head(embedding).float()
        prediction = logits.argmax(1)
        target = to_device(labels.astype(np.int64), device)
        found = numbers(logits, torch.where(target < 0, prediction, target))
        return {
            "embedding": embedding.float(),
            "prediction": prediction.int(),
            "confidence": logits.softmax(1).amax(1),
            **{name: found[name] for name in PROXY_STATISTICS},
        }

    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        parts = at_once(outputs, images, labels)
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
