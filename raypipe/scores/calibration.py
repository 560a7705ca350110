"""BatchNorm recalibration: estimate the running statistics of a checkpoint again, on the seed set.

While the learning rate is high, BatchNorm's exponential averages lag behind the weights. In eval
mode the network then is not the one that was trained: its gradients can be many times larger. One
pass in train mode with equal weight for every batch fixes this, as in stochastic weight averaging
(Izmailov et al. 2018, arXiv 1803.05407, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypipe.proxies.networks import ProxyNet


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set the running mean and variance of every BatchNorm to their average over the batches.

    The weights do not change. A network without BatchNorm is left alone, and no batch is read; so
    are layers that a proxy's training left as they were.
    `torch.optim.swa_utils.update_bn` is not used because it would enable dropout.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    batches : Iterable[Tensor]
        Inputs of the model, [n, ...] each.

    Returns
    -------
    nn.Module
        The model, in eval mode.
    """
    frozen = set(model.frozen_layers()) if isinstance(model, ProxyNet) else set()
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module not in frozen
    ]
    if not layers:
        return model.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average
    model.eval()
    for layer in layers:
        layer.training = True  # without dropout inside the layer, which networks of timm have
    with torch.no_grad():
        for images in batches:
            if len(images) > 1:
                model(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return model.eval()
