"""BatchNorm over the whole batch of a data-parallel training.

With it, the number of workers changes nothing but rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypipe.errors import ConfigError


def synchronize_batchnorm(model: nn.Module, gpu: bool) -> nn.Module:
    """Return the model with BatchNorm statistics computed over all workers together.

    Call it on every worker after torch.distributed is initialised and before the model is
    wrapped. Names and shapes of the weights do not change. On GPUs this uses
    `torch.nn.SyncBatchNorm`, which has no CPU kernels. With a single worker the model is returned
    unchanged.

    Raises
    ------
    ConfigError
        If there are several workers and a layer whose statistics they cannot share.
    """
    if distributed.get_world_size() == 1:
        return model
    check_layers(model, gpu)
    if gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Gradients are averaged in the default group. With a group of their own, statistics and
    # gradients never wait for each other.
    group = distributed.new_group()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _SharedBatchNorm
            object.__setattr__(module, "group", group)
    return model


def check_layers(model: nn.Module, gpu: bool) -> None:
    """Raise ConfigError if several workers could not share the statistics of a BatchNorm layer.

    They share those of PyTorch's own layers: all on GPUs, `nn.BatchNorm2d` on CPUs. A subclass that
    computes something else would lose what it adds.
    """
    for name, layer in model.train().named_modules():
        if not isinstance(layer, _BatchNorm) or not layer.training:
            continue
        if type(layer).forward is not _BatchNorm.forward or not (
            gpu or isinstance(layer, nn.BatchNorm2d)
        ):
            raise ConfigError(
                f"proxy.model: several workers cannot share the statistics of layer "
                f"{name.removeprefix('backbone.')} ({type(layer).__name__}); set proxy.workers to "
                "1, proxy.freeze to norm, or choose another network"
            )


class _Sum(torch.autograd.Function):
    """Sum over all workers, in the forward pass and for its gradients.

    The gradients are summed because the shared statistics affect every worker's loss.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, group: Any) -> Tensor:
        context.group = group
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total, group=context.group)
        return total, None


class _SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with mean and variance over the batches of all workers in `group`."""

    group: Any

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        # parts of a batch differ in size and can be empty
        count = x.new_tensor([x.numel() / x.shape[1]])
        distributed.all_reduce(count, group=self.group)
        mean = _Sum.apply(x.sum(dims), self.group) / count
        centred = x - mean.view(shape)
        # in two passes: the difference of two large sums would lose too much precision
        variance = _Sum.apply(centred.square().sum(dims), self.group) / count
        if (
            self.track_running_stats
            and self.running_mean is not None
            and self.running_var is not None
        ):
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                share = (
                    1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                )
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), share)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        result = centred * scale.view(shape)
        return result if self.bias is None else result + self.bias.view(shape)
