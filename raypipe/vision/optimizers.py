"""PyTorch's optimisers without PyTorch's compiler.

So that a compiled training leaves them out, the optimisers of PyTorch 2.15 import the compiler when
they are made, and SymPy with it. This takes two processor seconds in every process that trains.
raypipe compiles no training.
"""

from __future__ import annotations

import functools
import inspect
from typing import TypeVar

import torch

Kind = TypeVar("Kind", bound=type[torch.optim.Optimizer])

MARKED = ("add_param_group", "state_dict", "load_state_dict", "zero_grad", "step")
"""Methods that PyTorch wraps for its compiler."""


@functools.cache
def plain(kind: Kind) -> Kind:
    """Return a class of optimisers that computes the same and imports no compiler.

    `differentiable=True` has no effect.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in MARKED}
    # PyTorch's wrapper of this one also turns gradients off
    methods["step"] = torch.no_grad()(methods["step"])
    result: Kind = type(kind.__name__, (kind,), methods)  # type: ignore[assignment]
    return result
