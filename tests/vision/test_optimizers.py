"""Optimisers without PyTorch's compiler do what PyTorch's do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from raypipe.vision.optimizers import plain

KINDS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
]


def _trained(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(4)
    layer, images = nn.Linear(5, 3), torch.randn(6, 5)
    optimizer = kind(layer.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        optimizer.zero_grad()
        layer(images).square().sum().backward()
        optimizer.step()
        schedule.step()
        if step == 1:  # a training that was resumed
            state = optimizer.state_dict()
            optimizer = kind(layer.parameters(), **options)
            optimizer.load_state_dict(state)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return layer, optimizer


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_weights_and_state_are_those_of_torch(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    layer, optimizer = _trained(plain(kind), options)
    expected, of_torch = _trained(kind, options)
    assert torch.equal(layer.weight, expected.weight) and layer.weight.grad_fn is None
    state, of_torch_state = optimizer.state_dict(), of_torch.state_dict()
    assert state["param_groups"] == of_torch_state["param_groups"]
    for index, slots in of_torch_state["state"].items():
        for name, value in slots.items():
            assert torch.equal(state["state"][index][name], value), name


def test_a_training_imports_no_compiler() -> None:
    code = (
        "import sys; sys.modules['torch._dynamo'] = None\n"
        "from test_optimizers import KINDS, _trained, plain\n"
        "for kind, options in KINDS: _trained(plain(kind), options)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=__file__.rpartition("/")[0], check=True)
