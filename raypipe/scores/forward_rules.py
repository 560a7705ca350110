"""Layers of a tensor with a derivative: rules by hand for those that PyTorch makes expensive.

PyTorch 2.15 composes the derivative of a norm layer of many elementwise products, which take 12 to
17 times as long as the layer; the rules here take about half as long as that, or less. That of a
linear layer takes three products, one of which is added where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypipe.scores.dual_tensors import Dual

Rule = Callable[[Any, "Dual | Tensor", Mapping[str, Tensor]], Dual]
"""Takes a layer, its input (a tensor has no derivative) and the derivatives of its own weights,
"weight" and "bias", which a layer without weights lacks. Hooks of the layer are not called."""


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a layer in eval mode, None if it has none.

    A subclass has none: it may compute something else.
    """
    if isinstance(module, _BatchNorm) and module.running_mean is None:
        return None  # normalised over the batch
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        return None  # it casts functions, but nothing that is changed in place
    return _RULES.get(type(module))


def _linear(module: nn.Linear, x: Dual | Tensor, tangents: Mapping[str, Tensor]) -> Dual:
    """Return W x + b and W x' + W' x + b'."""
    value = x.value if isinstance(x, Dual) else x
    result = F.linear(value, module.weight, module.bias)
    tangent = F.linear(value, tangents["weight"], tangents.get("bias"))
    if isinstance(x, Dual):  # one pass: the product is added where the sum is
        tangent = tangent.reshape(-1, module.out_features)
        tangent.addmm_(x.tangent.reshape(-1, module.in_features), module.weight.T)
        tangent = tangent.view(result.shape)
    return Dual(result, tangent)


def _batch_norm(module: _BatchNorm, x: Dual | Tensor, tangents: Mapping[str, Tensor]) -> Dual:
    """Return the layer in eval mode, an affine map of each channel, and its derivative."""
    assert module.running_mean is not None and module.running_var is not None
    value = x.value if isinstance(x, Dual) else x
    result = F.batch_norm(
        value, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
    )
    scale = (module.running_var + module.eps).rsqrt()

    def per_channel(factors: Tensor) -> Tensor:
        return factors.view(-1, *[1] * (value.ndim - 2))

    slope = constant = None
    if tangents:
        slope = tangents["weight"] * scale
        constant = per_channel(tangents.get("bias", 0.0) - slope * module.running_mean)
        slope = per_channel(slope)
    weight = per_channel(scale if module.weight is None else module.weight * scale)
    tangent = x.tangent * weight if isinstance(x, Dual) else None
    return Dual(result, _plus(tangent, value, slope, constant))


def _layer_norm(module: nn.LayerNorm, x: Dual | Tensor, tangents: Mapping[str, Tensor]) -> Dual:
    """Return the layer and its derivative. See `_group_norm`; the features are one group."""
    value = x.value if isinstance(x, Dual) else x
    shape = list(module.normalized_shape)
    result, mean, scale = torch.native_layer_norm(
        value, shape, module.weight, module.bias, module.eps
    )
    normalised = (value - mean).mul_(scale)
    tangent = None
    if isinstance(x, Dual):
        axes = list(range(-len(shape), 0))
        tangent = x.tangent - x.tangent.mean(axes, keepdim=True)
        tangent.addcmul_(normalised, (normalised * x.tangent).mean(axes, keepdim=True), value=-1)
        tangent.mul_(scale)
        if module.weight is not None:
            tangent.mul_(module.weight)
    return Dual(result, _plus(tangent, normalised, tangents.get("weight"), tangents.get("bias")))


def _group_norm(module: nn.GroupNorm, x: Dual | Tensor, tangents: Mapping[str, Tensor]) -> Dual:
    """Return the layer and its derivative.

    With the input x of a group of channels, d = x - mean(x) and r = 1 / deviation(x),

        y = weight r d + bias
        y' = weight r (x' - mean(x') - r^2 mean(d x') d) + weight' r d + bias'
    """
    value = x.value if isinstance(x, Dual) else x
    channels_last = value.device.type == "cpu" and value.ndim == 4
    if not (channels_last and value.is_contiguous(memory_format=torch.channels_last)):
        value = value.contiguous()  # as F.group_norm does before it calls the kernel
    count, channels, groups = len(value), value.shape[1], module.num_groups
    positions = value[0, 0].numel()
    result, mean, deviation = torch.native_group_norm(
        value, module.weight, module.bias, count, channels, positions, groups, module.eps
    )

    def per_channel(factors: Tensor) -> Tensor:
        """Shape [n or 1, channels] or [n, groups, 1] to that of the input, for broadcasting."""
        if factors.ndim == 3:
            factors = factors.expand(-1, -1, channels // groups).flatten(1)
        return factors.reshape(-1, channels, *[1] * (value.ndim - 2))

    def mean_of(values: Tensor) -> Tensor:
        # positions first: their sums are fast in every memory format
        means = values.flatten(2).mean(2) if values.ndim > 2 else values
        return per_channel(means.unflatten(1, (groups, -1)).mean(2, keepdim=True))

    centred = value - per_channel(mean[..., None])
    scale = per_channel(deviation[..., None])
    slope = constant = tangent = None
    if tangents:
        slope = per_channel(tangents["weight"]) * scale
    if "bias" in tangents:
        constant = per_channel(tangents["bias"])
    if isinstance(x, Dual):
        weight = scale if module.weight is None else per_channel(module.weight) * scale
        pull = weight * scale.square() * mean_of(centred * x.tangent)
        slope = -pull if slope is None else slope - pull
        moved = weight * mean_of(x.tangent)
        constant = -moved if constant is None else constant - moved
        tangent = x.tangent * weight
    return Dual(result, _plus(tangent, centred, slope, constant))


def _plus(
    tangent: Tensor | None, values: Tensor, slope: Tensor | None, constant: Tensor | None
) -> Tensor:
    """Return tangent + values * slope + constant, in the memory of the tangent if there is one."""
    if tangent is None:
        assert slope is not None, "neither the input nor the layer has a derivative"
        tangent = values * slope
    elif slope is not None:
        tangent.addcmul_(values, slope)
    return tangent if constant is None else tangent.add_(constant)


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
