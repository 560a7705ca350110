"""BatchNorm over the whole batch of a data-parallel training, so that the number of workers changes rounding and nothing else."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn


def share_statistics(model: nn.Module, gpu: bool) -> nn.Module:
    """The model with BatchNorm layers that take mean and variance over the parts of a batch on all workers together.

    Call it on every worker after torch.distributed is ready and before the model is wrapped; names and shapes of weights stay. On GPUs
    this is `torch.nn.SyncBatchNorm`, which has no CPU kernels. Of a single worker the model is returned as it is.
    """
    if distributed.get_world_size() == 1:
        return model
    if gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    group = (
        distributed.new_group()
    )  # gradients are averaged in the group of all; the two never wait for one another
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _SharedBatchNorm
            object.__setattr__(module, "group", group)
    return model


class _Sum(torch.autograd.Function):
    """The sum over all workers; so is that of its gradients, since what is shared matters for every worker's loss."""

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
    group: Any

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        count = x.new_tensor(
            [x.numel() / x.shape[1]]
        )  # a worker's part may be larger than another's, or empty
        distributed.all_reduce(count, group=self.group)
        mean = _Sum.apply(x.sum(dims), self.group) / count
        centred = x - mean.view(shape)
        # in two passes, since the difference of two large sums would lose what tells workers apart from rounding
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
