"""Fast directional derivatives of the loss: forward mode over the network's traced graph.

`torch.func.jvp` (`raypipe.scores.moso.alignments`) is exact and general, but visits every layer
three times: for the value, for the derivative through the input, and for the derivative through
the weights. `Aligner` computes the same number and avoids work:

- In eval mode BatchNorm is a fixed linear map. It is folded into the preceding convolution, and its
  part of the direction into the convolution's (by differentiating the folding), once per checkpoint
  instead of once per batch.
- Values that have no derivative yet (everything before the first weight) are not differentiated.
- Activations are changed in place where nothing else needs them, and weights are laid out once in
  the memory format that the kernels prefer.

Layers without a rule here go through `torch.func.jvp` one by one. So every network that
`torch.fx` can trace is supported, exactly. A network that it cannot trace is left to `alignments`
as a whole.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _BatchNorm

from raypipe.scores.moso import alignments, norm_of

IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "setitem")
"""Names of in-place operators without a trailing underscore."""
FRESH = (operator.add, operator.iadd, torch.add, torch.relu, F.relu)
"""Functions whose results are never views of other tensors."""


@dataclass
class _Dual:
    """A value and its derivative along the direction.

    Attributes
    ----------
    value, tangent : Tensor
        Of the same shape.
    own : bool
        Whether no other value shares the memory, so that it can be overwritten.
    """

    value: Tensor
    tangent: Tensor
    own: bool = True


class Aligner:
    """Compute < direction, grad l_i > of batches, for one network and one direction.

    l_i is the cross-entropy of sample i.

    Parameters
    ----------
    model : nn.Module
        Put into eval mode. Its weights are read once, when the object is created.
    direction : Mapping[str, Tensor]
        Tensors shaped like the parameters, usually the mean gradient G_t.
    channels_last : bool
        Lay out weights, and with them activations, with the channels innermost: the format that
        convolution kernels prefer.
    compiled : bool
        Let `torch.compile` fuse the graph. Compilation takes about a minute, so this pays off for
        many batches of one shape.

    Raises
    ------
    FloatingPointError
        If the direction is not finite.
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
        self._length = norm_of(direction)
        graph = None if self._length == 0 else _trace(model)
        self._run: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        if graph is None:
            self._model, self._direction = model, direction
        else:
            # tied weights share the name of the first
            names = {id(value): name for name, value in model.named_parameters()}
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
        """Whether the network was traced. If not, every batch goes through `alignments`."""
        return self._run is not None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the alignment of every sample of a batch.

        Parameters
        ----------
        images : Tensor
            Input of the model, [n, ...].
        labels : Tensor
            int64 [n].

        Returns
        -------
        Tensor
            [n], float32 (float64 for a float64 network).
        """
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
    """Return the network's graph, or None if it cannot be traced or used.

    A graph is not usable if it changes a value in place that is used again: the graph does not
    show this.
    """
    try:
        module = fx.symbolic_trace(model)
    except Exception:  # whatever a network's own code raises on a symbolic value
        return None
    return None if any(_overwrites(module, node) for node in module.graph.nodes) else module.eval()


def _overwrites(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node changes in place a value that another node might still use."""
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
    """Run the graph on plain values and on `_Dual`s."""

    def __init__(
        self, module: fx.GraphModule, tangents: Mapping[str, Tensor], layout: torch.memory_format
    ) -> None:
        super().__init__(module)
        self._convolutions, self._folded_norms = _fold(module, tangents, layout)
        for name in (*self._convolutions, *self._folded_norms):
            module.delete_submodule(name)  # the folded convolutions hold their weights
        self._tangents = {
            name: tangents[name] for name, _ in module.named_parameters(remove_duplicate=False)
        }

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's output and its derivative."""
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
        if target in self._folded_norms:
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
        """Whether no other node needs the running node's first argument, `value`."""
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
    """The interpreter as a compiled graph of plain tensor operations.

    It is compiled for the shape of the first batch. Batches of other shapes run uncompiled.
    """

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
    """Mark a value as one that shares its memory with another."""
    return _Dual(value.value, value.tangent, own=False) if isinstance(value, _Dual) else value


def _generic(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    weights: dict[str, Tensor] | None = None,
    tangents: dict[str, Tensor] | None = None,
) -> _Dual:
    """Apply `torch.func.jvp` to one node.

    The node computes `function(*args, **kwargs)`, or `function(weights, *args, **kwargs)` if it has
    weights.
    """
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
    """Return every plain convolution by name, and the names of the norm layers folded into one."""
    calls = Counter(node.target for node in module.graph.nodes if node.op == "call_module")
    convolutions: dict[str, _Convolution] = {}
    folded_norms: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "call_module" or not isinstance(
            convolution := module.get_submodule(node.target), nn.Conv2d
        ):
            continue
        if convolution.padding_mode != "zeros" or len(node.args) != 1:
            continue
        weights = {name: value.detach() for name, value in convolution.named_parameters()}
        along = {name: tangents[f"{node.target}.{name}"] for name in weights}
        norm, norm_name = None, _foldable_norm(module, node, calls)
        if norm_name is not None:
            norm = module.get_submodule(norm_name)
            folded_norms.add(norm_name)
            for name, value in norm.named_parameters():
                weights[f"norm.{name}"] = value.detach()
                along[f"norm.{name}"] = tangents[f"{norm_name}.{name}"]
        convolutions[node.target] = _Convolution(convolution, norm, weights, along, layout)
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
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
        return str(users[0])
    return None
