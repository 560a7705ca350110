#!/usr/bin/env bash
# torch 2.15.0: making an optimizer imports PyTorch's compiler and SymPy, although nothing is compiled.
#
# Expected: torch.compile is opt-in. A process that trains without it never loads torch._dynamo.
# Seen: `torch.optim.SGD(...)` alone imports torch._dynamo and torch._inductor, 900 modules in two seconds of a processor.
# Methods of optimizers are marked for the compiler, and the mark imports it when they are called. It counts where many
# short-lived processes train.
# What to do: call the methods without the mark, `inspect.unwrap(torch.optim.SGD.step)` and so on in a subclass, or import
# torch._dynamo once in a process that forks the others.
#
# Needs Python 3.11 or newer and a package index; installs gigabytes on Linux. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.15.0
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import sys
import time

import torch

print("torch", torch.__version__)
weight = torch.nn.Parameter(torch.ones(3))
(weight**2).sum().backward()
names = ("torch._dynamo", "torch._inductor", "sympy")
before, started = set(sys.modules), time.process_time()
assert not before & {"torch._dynamo", "torch._inductor"}, "the behaviour has changed: torch itself imports it"
torch.optim.SGD([weight], lr=0.1)
added = set(sys.modules) - before
print(f"torch.optim.SGD(...): {len(added)} modules in {time.process_time() - started:.1f} s,", *(sorted(set(names) & added)))
assert "torch._dynamo" in added, "the behaviour has changed"
PYTHON
