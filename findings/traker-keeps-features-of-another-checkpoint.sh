#!/usr/bin/env bash
# traker 0.3.2, torch 2.15.0: features of another checkpoint with the same model_id are kept.
#
# Expected: after load_checkpoint(other weights, model_id=0), featurize() computes features of these weights, or refuses.
# Seen: it skips every sample that has features, in a folder of an earlier run too (save_dir is ./trak_results by
# default, load_from_save_dir is True). The features stay those of the first weights, without an error or a warning.
# What to do: use an empty save_dir, or another model_id, for every checkpoint.
#
# Needs Python 3.11 or newer and a package index; installs gigabytes on Linux. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check traker==0.3.2 torch==2.15.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import logging

import torch
from trak import TRAKer
from trak.projectors import NoOpProjector

torch.manual_seed(0)
x, y = torch.randn(4, 8), torch.randint(0, 3, (4,))


def features(weights, save_dir):
    model = torch.nn.Linear(8, 3)
    traker = TRAKer(
        model, "image_classification", 4, save_dir, device="cpu", use_half_precision=False,
        projector=NoOpProjector(device="cpu"), logging_level=logging.WARNING,
    )
    traker.load_checkpoint(weights, model_id=0)
    traker.featurize((x, y), num_samples=4)
    return torch.tensor(traker.saver.current_store["grads"])


print("torch", torch.__version__)
first, second = (torch.nn.Linear(8, 3).state_dict() for _ in range(2))
before = features(first, "results")
again = features(second, "results")
elsewhere = features(second, "other")
print("features of the second weights equal those of the first: ", torch.equal(before, again))
print("... in an empty folder:                                  ", torch.equal(before, elsewhere))
assert torch.equal(before, again) and not torch.equal(before, elsewhere), "the behaviour has changed"
PYTHON
