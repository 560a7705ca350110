"""Alignments from the per-sample gradients of opacus.

Opacus refuses BatchNorm, and computes nothing in eval mode. So each BatchNorm is replaced by the
fixed map that it is in eval mode, with a rule for its gradient, and the network is set to train
mode, in which these networks then compute the same. Its hooks forbid operations in place, so these
are replaced in the network's graph.
"""

from __future__ import annotations

import copy
import operator

import torch
import torch.nn.functional as F
from given import Given
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, fx, nn


class FixedNorm(nn.Module):
    """BatchNorm in eval mode. Its statistics are plain attributes: opacus refuses buffers."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(norm.weight), nn.Parameter(norm.bias)
        self.mean, self.inverse = [norm.running_mean], [(norm.running_var + norm.eps).rsqrt()]

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.inverse[0]
        return x * scale[:, None, None] + (self.bias - self.mean[0] * scale)[:, None, None]


@register_grad_sampler(FixedNorm)
def fixed_norm_gradient(
    layer: FixedNorm, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    shift, products = backprops.sum((2, 3)), (activations[0] * backprops).sum((2, 3))
    return {layer.weight: (products - shift * layer.mean[0]) * layer.inverse[0], layer.bias: shift}


def per_sample(given: Given, batch: int) -> Tensor:
    network = fx.symbolic_trace(copy.deepcopy(given.network))
    for node in network.graph.nodes:
        if node.target is operator.iadd:
            node.target = operator.add
    network.recompile()
    for layer in list(network.modules()):
        for name, child in layer.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(layer, name, FixedNorm(child))
            elif isinstance(child, nn.ReLU):
                child.inplace = False
    module = GradSampleModule(network.train(), loss_reduction="sum")
    rows = []
    for images, labels in zip(given.images.split(batch), given.labels.split(batch), strict=True):
        F.cross_entropy(module(images), labels, reduction="sum").backward()
        rows.append(
            sum(
                parameter.grad_sample.flatten(1) @ given.vector[name].flatten()
                for name, parameter in network.named_parameters()
            )
        )
        module.zero_grad()
    return torch.cat(rows)
