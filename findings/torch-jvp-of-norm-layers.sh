#!/usr/bin/env bash
# torch 2.15.0: the forward-mode derivative of GroupNorm and LayerNorm is 44 and 30 operations, the backward pass one.
#
# Expected: a derivative along one direction (torch.func.jvp) takes about what the forward and backward pass take, two to
# three times the layer, because it is as many multiplications.
# Seen (x86-64, one thread): 12 to 30 times the layer, several times the forward and backward pass. The backward pass is one
# fused kernel. The forward-mode derivative is composed of elementwise products and sums, each of which reads and writes the
# whole tensor.
# What to do: apply the rule by hand. With n = (x - mean) / deviation,
#     y' = weight (x' - mean(x') - n mean(n x')) / deviation + weight' n + bias'
#
# Needs Python 3.11 or newer and a package index; installs gigabytes on Linux. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import time

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
print("torch", torch.__version__)


class Kernels(TorchDispatchMode):
    """Count the operations that compute something."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += not function.is_view and "detach" not in str(function)
        return result


def kernels(call):
    with Kernels() as seen:
        call()
    return seen.count


def least(call, repeats=9):
    """Return the least time of a call, in ms."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


for name, layer, shape in [
    ("GroupNorm", nn.GroupNorm(4, 64), (16, 64, 32, 32)),
    ("LayerNorm", nn.LayerNorm(192), (16, 196, 192)),
]:
    x, along = torch.randn(shape), torch.randn(shape)
    weights = {key: value.detach() for key, value in layer.named_parameters()}
    directions = {key: torch.randn_like(value) for key, value in weights.items()}
    leaf = x.clone().requires_grad_()

    def run(weights, x, layer=layer):
        return functional_call(layer, weights, (x,))

    def forward(layer=layer, x=x):
        with torch.no_grad():
            layer(x)

    def both(layer=layer, leaf=leaf, along=along):
        torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], along)

    def directional(weights=weights, x=x, directions=directions, along=along):
        with torch.no_grad():
            jvp(run, (weights, x), (directions, along))

    for what, call in [("forward", forward), ("forward and backward", both), ("forward mode", directional)]:
        print(f"{name}, {what}: {kernels(call)} operations, {least(call):.2f} ms")
    assert kernels(both) < 5 and kernels(directional) > 15, "the behaviour has changed"
PYTHON
