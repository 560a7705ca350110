"""Tensors with a derivative along one direction, and functions of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


@dataclass
class Dual:
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


def has_dual(*values: Any) -> bool:
    """Whether any of the values, or of those inside them, has a derivative."""
    return any(isinstance(value, Dual) for value in tree_leaves(values))


def shared(value: Any) -> Any:
    """Mark a value as one that shares its memory with another."""
    return Dual(value.value, value.tangent, own=False) if isinstance(value, Dual) else value


def differentiate(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    weights: dict[str, Tensor] | None = None,
    tangents: dict[str, Tensor] | None = None,
) -> Any:
    """Apply a function to values, some of them with derivatives, by `torch.func.jvp`.

    It computes `function(*args, **kwargs)`, or `function(weights, *args, **kwargs)` if it has
    weights. Arguments and result can be lists or tuples of tensors and other values.
    """
    given, form = tree_flatten((args, dict(kwargs)))
    dual = [value for value in given if isinstance(value, Dual)]
    first = [weights] if weights is not None else []
    results: list[Any] = []
    result_form: Any = None

    def call(*values: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        nonlocal results, result_form
        rest = iter(values[len(first) :])
        filled = [next(rest) if isinstance(value, Dual) else value for value in given]
        positional, named = tree_unflatten(filled, form)
        result = function(*values[: len(first)], *positional, **named)
        results, result_form = tree_flatten(result)
        tensors = [value for value in results if isinstance(value, Tensor)]
        return (
            tuple(value for value in tensors if value.is_floating_point()),
            tuple(value for value in tensors if not value.is_floating_point()),
        )

    primals = (*first, *(value.value for value in dual))
    along = (*([tangents] if first else []), *(value.tangent for value in dual))
    # the stubs of torch lack the third result, that of `has_aux`
    outputs: tuple[Any, ...] = jvp(call, primals, along, has_aux=True)
    real, plain = zip(outputs[0], outputs[1], strict=True), iter(outputs[2])
    return tree_unflatten(
        [
            value
            if not isinstance(value, Tensor)
            else Dual(*next(real), own=False)
            if value.is_floating_point()
            else next(plain)
            for value in results
        ],
        result_form,
    )
