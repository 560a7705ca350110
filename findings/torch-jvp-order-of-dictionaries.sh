#!/usr/bin/env bash
# torch 2.15.0: torch.func.jvp refuses a dictionary of tangents whose keys come in another order.
#
# Expected: primals and tangents with the same keys are matched by key, as Python compares dictionaries, and as
# functional_call and load_state_dict take them.
# Seen: "Expected primals and tangents to have the same python structure", followed by both structures, which have the
# same names. Insertion order is part of the structure. Weights from model.named_parameters() and a direction from a
# safetensors file, whose names come sorted, differ in it.
# What to do: build the tangents in the order of the primals: {name: direction[name] for name in weights}.
#
# Needs Python 3.11 or newer and a package index; installs gigabytes on Linux. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import torch
from torch.func import jvp

weights = {"weight": torch.tensor(2.0), "bias": torch.tensor(1.0)}
direction = {"bias": torch.tensor(1.0), "weight": torch.tensor(10.0)}


def output(values):
    return 3 * values["weight"] + values["bias"]


print("torch", torch.__version__)
ordered = {name: direction[name] for name in weights}
assert ordered == direction, "the same dictionary to Python"
print("in the order of the primals:", jvp(output, (weights,), (ordered,))[1].item())
try:
    jvp(output, (weights,), (direction,))
except RuntimeError as error:
    message = str(error)
    print("in another order:", message[:80])
assert "same python structure" in message, "the behaviour has changed"
PYTHON
