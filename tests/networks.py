"""Networks and images shared by the tests of scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def as_trained(model: nn.Module) -> nn.Module:
    """The network in eval mode, its BatchNorm with statistics as after a training, not the 0 and 1 of a fresh one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def batch(count: int, size: int, classes: int = 5, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Random images uint8 [count, 3, size, size] and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, classes, (count,), generator=generator)
