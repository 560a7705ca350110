#!/usr/bin/env bash
# dattri 0.3.0, torch 2.15.0: TracIn projects gradients to 512 dimensions, also with projector_kwargs=None.
#
# Expected: TracInAttributor(..., projector_kwargs=None), the default, multiplies the gradients themselves:
# `attribute` has a branch for None that does so.
# Seen: the constructor turns None into a random projection to 512 dimensions. Influences are approximate.
# The settings are one dictionary of the module, which the constructor updates: an
# attributor with projector_kwargs={"proj_dim": 4} makes all later ones project to 4 dimensions.
# What to do: set `attributor.projector_kwargs = None` after the constructor. To project, state every setting.
#
# Needs Python 3.11 or newer and a package index; installs gigabytes on Linux. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check dattri==0.3.0 torch==2.15.0
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import torch
import torch.nn.functional as F
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = torch.nn.Linear(100, 10)
x, y = torch.randn(4, 100), torch.randint(0, 10, (4,))


def loss(parameters, data):
    image, label = data
    return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])


def gradient(row):
    parts = torch.autograd.grad(F.cross_entropy(model(x[row : row + 1]), y[row : row + 1]), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


own = torch.stack([gradient(row) for row in range(4)])
exact = own @ own.T


def difference(switched_off, **options):
    task = AttributionTask(loss, model, model.state_dict())
    attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False, **options)
    if switched_off:
        attributor.projector_kwargs = None
    data = DataLoader(TensorDataset(x, y), 4)
    error = (attributor.attribute(data, data) - exact).abs().max() / exact.abs().max()
    print(f"{options or 'default'}, switched off afterwards: {switched_off}; largest relative error {error:.1e}")
    return error


print("torch", torch.__version__)
first = difference(False)
assert difference(True) < 1e-5, "the behaviour has changed"
assert first > 1e-3 and difference(False, projector_kwargs=None) == first, "the behaviour has changed"
four = difference(False, projector_kwargs={"proj_dim": 4})
assert difference(False) == four != first, "the behaviour has changed"
PYTHON
