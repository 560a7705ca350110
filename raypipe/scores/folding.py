"""Convolutions with the BatchNorm that follows them folded in, and their derivative."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypipe.scores.dual_tensors import Dual

TangentOf = Callable[[str], Tensor]
"""Takes the name of a parameter and returns its part of the direction."""


class FoldedConvolution:
    """A convolution with its norm layer folded in, and its derivative along the direction.

    Parameters
    ----------
    module : nn.Conv2d
        The convolution.
    norm : nn.Module, optional
        The BatchNorm that follows it, in eval mode.
    weights, tangents : dict[str, Tensor]
        Parameters and their part of the direction: "weight" and "bias" of the convolution,
        "norm.weight" and "norm.bias" of the norm layer.
    layout : torch.memory_format
        Memory format of the folded weight.
    """

    def __init__(
        self,
        module: nn.Conv2d,
        norm: nn.Module | None,
        weights: dict[str, Tensor],
        tangents: dict[str, Tensor],
        layout: torch.memory_format,
    ) -> None:
        self._stride, self._padding = module.stride, module.padding
        self._dilation, self._groups = module.dilation, module.groups
        weight, weight_tangent = weights["weight"], tangents["weight"]
        zeros = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        bias, bias_tangent = weights.get("bias", zeros), tangents.get("bias", zeros)
        if norm is not None:
            assert isinstance(norm, _BatchNorm)
            assert norm.running_mean is not None and norm.running_var is not None
            # y = scale * (w x + bias - mean) + shift, and its derivative by hand: `jvp` would
            # import torch's compiler for these few lines.
            inverse_deviation = torch.rsqrt(norm.running_var + norm.eps)
            scale = inverse_deviation * weights.get("norm.weight", 1.0)
            scale_tangent = inverse_deviation * tangents.get("norm.weight", 0.0)
            centred_bias = bias - norm.running_mean
            bias_tangent = (
                bias_tangent * scale + centred_bias * scale_tangent + tangents.get("norm.bias", 0.0)
            )
            bias = centred_bias * scale + weights.get("norm.bias", 0.0)
            per_channel, per_channel_tangent = (
                value.view(-1, 1, 1, 1) for value in (scale, scale_tangent)
            )
            weight_tangent = weight_tangent * per_channel + weight * per_channel_tangent
            weight = weight * per_channel
        self._weight = weight.contiguous(memory_format=layout)
        self._weight_tangent = weight_tangent.contiguous(memory_format=layout)
        has_bias = norm is not None or module.bias is not None
        self._bias: Tensor | None = bias if has_bias else None
        self._bias_tangent: Tensor | None = bias_tangent if has_bias else None

    def _convolve(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(
            inputs, weight, bias, self._stride, self._padding, self._dilation, self._groups
        )

    def __call__(self, x: Any) -> Dual:
        if not isinstance(x, Dual):
            return Dual(
                self._convolve(x, self._weight, self._bias),
                self._convolve(x, self._weight_tangent, self._bias_tangent),
            )
        value = self._convolve(x.value, self._weight, self._bias)
        tangent = self._convolve(x.tangent, self._weight, None)
        return Dual(
            value, tangent.add_(self._convolve(x.value, self._weight_tangent, self._bias_tangent))
        )


def fold_norms(
    module: fx.GraphModule, tangent_of: TangentOf, layout: torch.memory_format
) -> tuple[dict[str, FoldedConvolution], set[str]]:
    """Return every plain convolution by name, and the names of the norm layers folded into one."""
    calls = Counter(node.target for node in module.graph.nodes if node.op == "call_module")
    convolutions: dict[str, FoldedConvolution] = {}
    folded_norms: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "call_module" or not isinstance(
            convolution := module.get_submodule(node.target), nn.Conv2d
        ):
            continue
        if convolution.padding_mode != "zeros" or len(node.args) != 1:
            continue
        if not is_plain(convolution):
            continue
        weights = {name: value.detach() for name, value in convolution.named_parameters()}
        along = {name: tangent_of(f"{node.target}.{name}") for name in weights}
        norm, norm_name = None, _foldable_norm(module, node, calls)
        if norm_name is not None:
            norm = module.get_submodule(norm_name)
            folded_norms.add(norm_name)
            for name, value in norm.named_parameters():
                weights[f"norm.{name}"] = value.detach()
                along[f"norm.{name}"] = tangent_of(f"{norm_name}.{name}")
        convolutions[node.target] = FoldedConvolution(convolution, norm, weights, along, layout)
    return convolutions, folded_norms


def _foldable_norm(
    module: fx.GraphModule, convolution: fx.Node, calls: Mapping[str, int]
) -> str | None:
    """Return the name of the BatchNorm that alone uses a convolution's output, if there is one.

    Both layers must run only once (`calls` counts the runs of every module).
    """
    users = [user.target for user in convolution.users if user.op == "call_module"]
    if not len(convolution.users) == len(users) == 1:
        return None
    if not calls[str(convolution.target)] == calls[str(users[0])] == 1:
        return None
    norm = module.get_submodule(str(users[0]))
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and is_plain(norm):
        return str(users[0])
    return None


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes with its own weights, without hooks or parametrisations."""
    changed = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "parametrizations")
    own = dict(layer.named_parameters(recurse=False))
    return not changed and (not isinstance(layer, nn.Conv2d) or "weight" in own)
