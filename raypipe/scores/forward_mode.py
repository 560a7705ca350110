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
`torch.fx` can trace is supported, exactly. A network that it cannot trace, or whose graph cannot be
run, is left to `alignments` as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from raypipe.scores.attention import mathematical_attention
from raypipe.scores.dual_tensors import Dual, differentiate, has_dual, shared
from raypipe.scores.folding import TangentOf, fold_norms, is_plain
from raypipe.scores.forward_rules import rule_of
from raypipe.scores.moso import alignments, norm_of

IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "setitem")
"""Names of in-place operators without a trailing underscore."""
FRESH = (
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv, operator.matmul),
    *(torch.add, torch.mul, torch.matmul, torch.cat, torch.relu),
    *(F.relu, F.gelu, F.silu, F.linear, F.conv2d, F.layer_norm),
)
"""Functions whose results are never views of other tensors."""
PASSED_ON = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten)
"""Layers whose result in eval mode is their input, or a view of it."""


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
        # for `alignments`, unless the graph serves
        self._whole: tuple[nn.Module, Mapping[str, Tensor]] | None = (model, direction)
        if graph is not None:
            # tied weights share the name of the first
            names = {id(value): name for name, value in model.named_parameters()}
            parameters = dict(model.named_parameters(remove_duplicate=False))

            def tangent_of(name: str) -> Tensor:  # one by one: together they are a second network
                value = parameters[name]
                if not value.requires_grad:
                    return torch.zeros_like(value)
                return (direction[names[id(value)]] / self._length).to(value.dtype)

            layout = torch.channels_last if channels_last else torch.contiguous_format
            interpreter = _Interpreter(graph, tangent_of, layout)
            self._run = _Compiled(interpreter) if compiled else interpreter.logits

    @property
    def traced(self) -> bool:
        """Whether batches go through the network's graph. If not, they go through `alignments`."""
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
        result = self._run_graph(images)
        if result is None:
            assert self._whole is not None
            return alignments(*self._whole, images, labels)
        with torch.no_grad():
            logits, tangent = result
            if logits.dtype in (torch.bfloat16, torch.float16):
                logits, tangent = logits.float(), tangent.float()
            # d/dz of the cross-entropy is softmax(z) - onehot
            slope = logits.softmax(1)
            slope[torch.arange(len(labels), device=labels.device), labels] -= 1
            return (slope * tangent).sum(1) * self._length

    def _run_graph(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the logits and their derivative; None if the graph cannot be run."""
        if self._run is None:
            return None
        try:
            with torch.no_grad(), mathematical_attention():
                result = self._run(images)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever an operation raises on a value that it was not made for
            if self._whole is None:  # it could be run before
                raise
            self._run = None
            return None
        self._whole = None
        return result


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
        layer = module.get_submodule(str(node.target))
        changes = bool(getattr(layer, "inplace", False)) and not isinstance(layer, PASSED_ON)
    elif node.op == "call_method":
        changes = str(node.target).endswith("_")
    else:
        name = getattr(node.target, "__name__", "")
        changes = node.op == "call_function" and (
            name.endswith("_") or name in IN_PLACE_OPERATORS or "out" in node.kwargs
        )
    changes = changes or node.kwargs.get("inplace", False) is True
    return changes and not (node.args and _is_fresh(module, node.args[0]))


def _is_fresh(module: fx.GraphModule, value: Any) -> bool:
    """Whether a value is a tensor of its own that a single node uses."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    passed_on = (
        isinstance(module.get_submodule(str(value.target)), PASSED_ON)
        if value.op == "call_module"
        else getattr(value.target, "__name__", "") == "stochastic_depth"
    )
    if passed_on:
        return bool(value.args) and _is_fresh(module, value.args[0])
    return value.op == "call_module" or value.target in FRESH


class _Interpreter(fx.Interpreter):
    """Run the graph on plain values and on `Dual`s."""

    def __init__(
        self, module: fx.GraphModule, tangent_of: TangentOf, layout: torch.memory_format
    ) -> None:
        super().__init__(module)
        self._convolutions, self._folded_norms = fold_norms(module, tangent_of, layout)
        for name in (*self._convolutions, *self._folded_norms):
            module.delete_submodule(name)  # the folded convolutions hold their weights
        self._tangents = {
            name: tangent_of(name) for name, _ in module.named_parameters(remove_duplicate=False)
        }

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's output and its derivative."""
        result = self.run(images)
        return (
            (result.value, result.tangent)
            if isinstance(result, Dual)
            else (result, torch.zeros_like(result))
        )

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return Dual(value, self._tangents[target], own=False) if target in self._tangents else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self._folded_norms:
            return args[0]
        if target in self._convolutions:
            return self._convolutions[target](args[0])
        module = self.fetch_attr(target)
        tangents = {
            name: self._tangents[f"{target}.{name}"] for name, _ in module.named_parameters()
        }
        if not tangents and not has_dual(args, kwargs):
            return module(*args, **kwargs)
        if isinstance(module, nn.ReLU):
            return self._relu(args[0])
        if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
            return shared(args[0])
        if (rule := rule_of(module)) and is_plain(module) and len(args) == 1:
            return rule(module, args[0], tangents)
        weights = {name: value.detach() for name, value in module.named_parameters()}
        return differentiate(
            lambda weights, *rest, **named: functional_call(module, weights, rest, named),
            args,
            kwargs,
            weights,
            tangents,
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not has_dual(args, kwargs):
            return super().call_function(target, args, kwargs)
        if target is operator.getitem and not isinstance(args[0], Dual):
            return args[0][args[1]]  # one of the results of a layer
        if target is getattr and not isinstance(getattr(args[0].value, args[1]), Tensor):
            return getattr(args[0].value, *args[1:])
        if target in (torch.relu, F.relu):
            return self._relu(args[0])
        if (
            target in (operator.add, operator.iadd, torch.add)
            and all(isinstance(arg, Dual) for arg in args)
            and not kwargs
        ):
            return self._add(*args)
        return differentiate(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not has_dual(args, kwargs):
            return super().call_method(target, args, kwargs)
        if target in ("size", "dim", "numel"):
            return getattr(args[0].value, target)(*args[1:], **kwargs)
        return differentiate(
            lambda first, *rest, **named: getattr(first, target)(*rest, **named), args, kwargs
        )

    def _may_overwrite(self, value: Any) -> bool:
        """Whether no other node needs the running node's first argument, `value`."""
        argument = self._node.args[0]
        return isinstance(argument, fx.Node) and len(argument.users) == 1 and value.own

    def _relu(self, x: Dual) -> Dual:
        value = x.value.relu_() if self._may_overwrite(x) else x.value.relu()
        return Dual(value, torch.ops.aten.threshold_backward(x.tangent, value, 0))

    def _add(self, left: Dual, right: Dual) -> Dual:
        if (
            self._may_overwrite(left)
            and left.value.shape == right.value.shape
            and self._node.args[0] is not self._node.args[1]
        ):
            return Dual(left.value.add_(right.value), left.tangent.add_(right.tangent))
        return Dual(left.value + right.value, left.tangent + right.tangent)


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
