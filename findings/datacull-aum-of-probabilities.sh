#!/usr/bin/env bash
# datacull 1.0.2, torch 2.15.0: AUM is that of probabilities, not of logits.
#
# Expected: AUM as in its docstring and its paper (Pleiss et al. 2020): the mean over epochs of the logit of the label
# less the largest other logit.
# Seen: the logits that were logged go through a softmax first, so every margin lies between -1 and 1, and samples are
# ranked differently. A second compute_importance() on the same object adds to the sums of the first.
# What to do: compute the margins yourself. Call compute_importance() once per object.
#
# Needs Python 3.11 or newer and a package index; installs gigabytes on Linux. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check datacull==1.0.2 torch==2.15.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import os

import numpy as np
import torch
from datacull.data import DCDataset
from datacull.logger import DCLogger
from datacull.methods.CCS import AUMImportance
from torch.utils.data import TensorDataset

logits = torch.tensor([[[2.0, 0.0, 0.0], [9.0, 8.5, 0.0]], [[2.0, 0.0, 0.0], [20.0, 0.0, 0.0]]])  # epoch, sample, class
labels = np.array([0, 0])
os.mkdir("log")
logger = DCLogger("log/")
for epoch, output in enumerate(logits):
    logger.log_metric(epoch, torch.arange(2), output)
data = TensorDataset(torch.zeros(2, 1))
data.targets = labels
importance = AUMImportance(DCDataset(data), 2, logger)
first = importance.compute_importance().copy()
second = importance.compute_importance()
expected = (logits[:, :, 0] - logits[:, :, 1:].max(2).values).mean(0).numpy()
print("margins of logits:       ", expected)
print("compute_importance():    ", first)
print("the same, a second time: ", second)
assert expected[0] < expected[1] and first[0] > first[1], "the behaviour has changed"
assert np.allclose(second, 2 * first), "the behaviour has changed"
PYTHON
