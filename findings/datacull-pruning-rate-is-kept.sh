#!/usr/bin/env bash
# datacull 1.0.2, torch 2.15.0: pruning_rate is the fraction that is kept.
#
# Expected: DCDataLoader's docstring: "Fraction of samples to remove while pruning. Example: 0.2 -> keep 80%."
# Seen: pruning_rate=0.2 keeps 20 %. (The docstrings of the subclasses TDDSDataLoader and MetriQDataLoader say "Fraction
# of total samples to keep", which is right.)
# What to do: pass the fraction to keep.
#
# Needs Python 3.11 or newer and a package index; installs gigabytes on Linux. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check datacull==1.0.2 torch==2.15.0
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch
from datacull.data import DCDataLoader, DCDataset
from datacull.methods.TDDS import TDDSDataLoader
from torch.utils.data import TensorDataset

dataset = DCDataset(TensorDataset(torch.zeros(100, 1)))
loader = TDDSDataLoader(dataset, pruning_rate=0.2)
loader.resample(np.arange(100.0))
print("documented:", next(line.strip() for line in DCDataLoader.__init__.__doc__.splitlines() if "0.2" in line))
print("kept of 100 samples with pruning_rate=0.2:", len(loader))
assert len(loader) == 20, "the behaviour has changed"
PYTHON
