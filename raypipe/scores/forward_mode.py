"""Directional derivatives of the loss at the speed limit: forward mode over the network's own graph, BatchNorm folded away.

`torch.func.jvp` (`raypipe.scores.moso.alignments`) is exact and general, and visits every layer three times: the value,
the derivative through the input, the derivative through the weights. `Aligner` computes the same number and saves what need not be done:

- BatchNorm in eval mode is linear with fixed numbers: it is folded into the convolution before it, and its part of the direction into that
  of the convolution (the derivative of the folding, by `torch.func.jvp`), once per checkpoint instead of once per batch;
- what has no derivative yet (everything before the first weight) is not differentiated;
- activations are changed in place where nothing else needs them, and weights are laid out once in the format the kernels want.

Layers without a rule here go through `torch.func.jvp` one by one, so any network that `torch.fx` can trace is served, exactly; one
that it cannot trace is left to `alignments` as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _BatchNorm

from raypipe.scores.moso import alignments, length_of

IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "setitem")
FRESH = (operator.add, operator.iadd, torch.add, torch.relu, F.relu)
"""Functions whose results are no views of anything else."""


@dataclass
class _Dual:
    """A value and its derivative along the direction. `own`: no other value lives in the same memory."""

    value: Tensor
    tangent: Tensor
    own: bool = True


class Aligner:
    """< direction, grad l_i > of a batch's cross-entropy, for one network and one direction.

    model          put into eval mode; its weights are read when the object is made
    direction      tensors shaped like the parameters, usually the mean gradient G_t
    channels_last  lay out weights, and with them activations, with the channels innermost: what convolution kernels prefer
    compiled       let `torch.compile` fuse the graph; worth its minute of compilation for many batches of one shape

    Raises FloatingPointError when the direction is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Mapping[str, Tensor],
        *,
        channels_last: bool = True,
        compiled: bool = False,
    ) -> None:
        model.eval()
        self._length = length_of(direction)
        graph = None if self._length == 0 else _trace(model)
        self._run: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        if graph is None:
            self._model, self._direction = model, direction
        else:
            names = {
                id(value): name for name, value in model.named_parameters()
            }  # of two tied weights, the first
            tangents = {
                name: (direction[names[id(value)]] / self._length).to(value.dtype)
                if value.requires_grad
                else torch.zeros_like(value)
                for name, value in model.named_parameters(remove_duplicate=False)
            }
            layout = torch.channels_last if channels_last else torch.contiguous_format
            interpreter = _Interpreter(graph, tangents, layout)
            self._run = _Compiled(interpreter) if compiled else interpreter.logits

    @property
    def traced(self) -> bool:
        """Whether the fast way is taken; else every batch goes through `alignments`."""
        return self._run is not None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: input of the model [n, ...];  labels: int64 [n];  returns [n], float32 (float64 for a float64 network)."""
        if self._run is None:
            return alignments(self._model, self._direction, images, labels)
        with torch.no_grad():
            logits, tangent = self._run(images)
            if logits.dtype in (torch.bfloat16, torch.float16):
                logits, tangent = logits.float(), tangent.float()
            # d/dz of the cross-entropy is softmax(z) - onehot
            slope = logits.softmax(1)
            slope[torch.arange(len(labels), device=labels.device), labels] -= 1
            return (slope * tangent).sum(1) * self._length


def _trace(model: nn.Module) -> fx.GraphModule | None:
    """The network's graph; None where there is none, or where it changes a value in place that is used again: a graph does not tell."""
    try:
        module = fx.symbolic_trace(model)
    except Exception:  # whatever a network's own code raises on a symbolic value
        return None
    return None if any(_overwrites(module, node) for node in module.graph.nodes) else module.eval()


def _overwrites(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node changes in place what another one may still use."""
    if node.op == "call_module":
        changes = bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    elif node.op == "call_method":
        changes = str(node.target).endswith("_")
    else:
        name = getattr(node.target, "__name__", "")
        changes = node.op == "call_function" and (
            name.endswith("_") or name in IN_PLACE_OPERATORS or "out" in node.kwargs
        )
    changes = changes or node.kwargs.get("inplace", False) is True
    target = node.args[0] if node.args else None
    fresh = (
        isinstance(target, fx.Node)
        and (target.op == "call_module" or target.target in FRESH)
        and len(target.users) == 1
    )
    return changes and not fresh


class _Interpreter(fx.Interpreter):
    """Runs the graph on values and `_Dual`s."""

    def __init__(
        self, module: fx.GraphModule, tangents: Mapping[str, Tensor], layout: torch.memory_format
    ) -> None:
        super().__init__(module)
        self._convolutions, self._gone = _fold(module, tangents, layout)
        for name in (*self._convolutions, *self._gone):
            module.delete_submodule(name)  # their weights live on in the folded ones
        self._tangents = {
            name: tangents[name] for name, _ in module.named_parameters(remove_duplicate=False)
        }

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output and its derivative."""
        result = self.run(images)
        return (
            (result.value, result.tangent)
            if isinstance(result, _Dual)
            else (result, torch.zeros_like(result))
        )

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return (
            _Dual(value, self._tangents[target], own=False) if target in self._tangents else value
        )

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self._gone:
            return args[0]
        if target in self._convolutions:
            return self._convolutions[target](args[0])
        module = self.fetch_attr(target)
        tangents = {
            name: self._tangents[f"{target}.{name}"] for name, _ in module.named_parameters()
        }
        if not tangents and not any(isinstance(arg, _Dual) for arg in (*args, *kwargs.values())):
            return module(*args, **kwargs)
        if isinstance(module, nn.ReLU):
            return self._relu(args[0])
        if isinstance(module, nn.Identity | nn.Dropout):
            return _shared(args[0])
        weights = {name: value.detach() for name, value in module.named_parameters()}
        return _generic(
            lambda weights, *rest, **named: functional_call(module, weights, rest, named),
            args,
            kwargs,
            weights,
            tangents,
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not any(isinstance(arg, _Dual) for arg in (*args, *kwargs.values())):
            return super().call_function(target, args, kwargs)
        if target is getattr:
            return getattr(args[0].value, *args[1:])
        if target in (torch.relu, F.relu):
            return self._relu(args[0])
        if (
            target in (operator.add, operator.iadd, torch.add)
            and all(isinstance(arg, _Dual) for arg in args)
            and not kwargs
        ):
            return self._add(*args)
        return _generic(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(args[0], _Dual):
            return super().call_method(target, args, kwargs)
        if target in ("size", "dim", "numel"):
            return getattr(args[0].value, target)(*args[1:], **kwargs)
        return _generic(
            lambda first, *rest, **named: getattr(first, target)(*rest, **named), args, kwargs
        )

    def _may_overwrite(self, value: Any) -> bool:
        """Whether the running node is the only one that needs its first argument, so that it may take its memory."""
        argument = self._node.args[0]
        return isinstance(argument, fx.Node) and len(argument.users) == 1 and value.own

    def _relu(self, x: _Dual) -> _Dual:
        value = x.value.relu_() if self._may_overwrite(x) else x.value.relu()
        return _Dual(value, torch.ops.aten.threshold_backward(x.tangent, value, 0))

    def _add(self, left: _Dual, right: _Dual) -> _Dual:
        if (
            self._may_overwrite(left)
            and left.value.shape == right.value.shape
            and self._node.args[0] is not self._node.args[1]
        ):
            return _Dual(left.value.add_(right.value), left.tangent.add_(right.tangent))
        return _Dual(left.value + right.value, left.tangent + right.tangent)


class _Compiled:
    """The interpreter's graph of plain tensor operations, compiled for the shape of the first batch; other shapes run as they are."""

    def __init__(self, interpreter: _Interpreter) -> None:
        self._plain = interpreter.logits
        self._shape: torch.Size | None = None
        self._fast = self._plain

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._shape is None:
            self._shape = images.shape
            self._fast = torch.compile(
                make_fx(lambda pixels: self._plain(pixels))(images), dynamic=False
            )
        return self._fast(images) if images.shape == self._shape else self._plain(images)


def _shared(value: Any) -> Any:
    return _Dual(value.value, value.tangent, own=False) if isinstance(value, _Dual) else value


def _generic(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    weights: dict[str, Tensor] | None = None,
    tangents: dict[str, Tensor] | None = None,
) -> _Dual:
    """`torch.func.jvp` of one node: `function(*args, **kwargs)`, or `function(weights, *args, **kwargs)` where there are any."""
    dual = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, _Dual)]

    def call(*values: Any) -> Any:
        first, rest = ([values[0]], iter(values[1:])) if weights is not None else ([], iter(values))
        filled = [next(rest) if isinstance(arg, _Dual) else arg for arg in args]
        named = {key: next(rest) if isinstance(arg, _Dual) else arg for key, arg in kwargs.items()}
        return function(*first, *filled, **named)

    primals = ([weights] if weights is not None else []) + [arg.value for arg in dual]
    along = ([tangents] if weights is not None else []) + [arg.tangent for arg in dual]
    both = jvp(call, tuple(primals), tuple(along))
    return _Dual(both[0], both[1], own=False)


class _Convolution:
    """A convolution and the norm layer behind it as one, with its derivative along the direction."""

    def __init__(
        self,
        module: nn.Conv2d,
        norm: nn.Module | None,
        weights: dict[str, Tensor],
        tangents: dict[str, Tensor],
        layout: torch.memory_format,
    ) -> None:
        self._stride, self._padding, self._dilation, self._groups = (
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )

        weight, weight_tangent = weights["weight"], tangents["weight"]
        none = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        bias, bias_tangent = weights.get("bias", none), tangents.get("bias", none)
        if norm is not None:
            assert (
                isinstance(norm, _BatchNorm)
                and norm.running_mean is not None
                and norm.running_var is not None
            )
            # y = scale * (w x + bias - mean) + shift, and its derivative; `jvp` would import torch's compiler for these lines
            spread = torch.rsqrt(norm.running_var + norm.eps)
            scale, scale_tangent = (
                spread * weights.get("norm.weight", 1.0),
                spread * tangents.get("norm.weight", 0.0),
            )
            bias_tangent = (
                bias_tangent * scale
                + (bias - norm.running_mean) * scale_tangent
                + tangents.get("norm.bias", 0.0)
            )
            bias = (bias - norm.running_mean) * scale + weights.get("norm.bias", 0.0)
            weight_tangent = weight_tangent * scale.view(-1, 1, 1, 1) + weight * scale_tangent.view(
                -1, 1, 1, 1
            )
            weight = weight * scale.view(-1, 1, 1, 1)
        plain = norm is None and module.bias is None
        self._weight, self._weight_tangent = (
            weight.contiguous(memory_format=layout),
            weight_tangent.contiguous(memory_format=layout),
        )
        self._bias: Tensor | None = None if plain else bias
        self._bias_tangent: Tensor | None = None if plain else bias_tangent

    def _convolve(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(
            inputs, weight, bias, self._stride, self._padding, self._dilation, self._groups
        )

    def __call__(self, x: Any) -> _Dual:
        if not isinstance(x, _Dual):
            return _Dual(
                self._convolve(x, self._weight, self._bias),
                self._convolve(x, self._weight_tangent, self._bias_tangent),
            )
        value = self._convolve(x.value, self._weight, self._bias)
        tangent = self._convolve(x.tangent, self._weight, None)
        return _Dual(
            value, tangent.add_(self._convolve(x.value, self._weight_tangent, self._bias_tangent))
        )


def _fold(
    module: fx.GraphModule, tangents: Mapping[str, Tensor], layout: torch.memory_format
) -> tuple[dict[str, _Convolution], set[str]]:
    """Every plain convolution by name, and the names of the norm layers that went into one."""
    calls: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    convolutions: dict[str, _Convolution] = {}
    gone: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "call_module" or not isinstance(
            convolution := module.get_submodule(node.target), nn.Conv2d
        ):
            continue
        if convolution.padding_mode != "zeros" or len(node.args) != 1:
            continue
        weights = {name: value.detach() for name, value in convolution.named_parameters()}
        along = {name: tangents[f"{node.target}.{name}"] for name in weights}
        norm, behind = None, [user.target for user in node.users if user.op == "call_module"]
        if len(node.users) == len(behind) == 1 and calls[node.target] == calls[behind[0]] == 1:
            module_behind = module.get_submodule(behind[0])
            if isinstance(module_behind, nn.BatchNorm2d) and module_behind.running_mean is not None:
                norm = module_behind
                gone.add(behind[0])
                weights |= {
                    f"norm.{name}": value.detach() for name, value in norm.named_parameters()
                }
                along |= {
                    f"norm.{name}": tangents[f"{behind[0]}.{name}"]
                    for name, _ in norm.named_parameters()
                }
        convolutions[node.target] = _Convolution(convolution, norm, weights, along, layout)
    return convolutions, gone
