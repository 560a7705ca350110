#!/usr/bin/env bash
# kronfluence 1.0.1, torch 2.15.0: compute_pairwise_scores returns None the first time, and the scores the second time.
#
# Expected: a function that is declared to return Optional[dict] returns the scores that it computed. None suggests that
# there are none.
# Seen: the scores are only written to a file, and the result is None. A second call with the same name finds the file,
# computes nothing and returns what is in it. It does so for other weights of the network, too.
# What to do: ignore the result, and call load_pairwise_scores(name). Pass overwrite_output_dir=True, or use another name
# for other weights.
#
# Needs Python 3.11 or newer and a package index; installs gigabytes on Linux. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check kronfluence==1.0.1 torch==2.15.0
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from torch.utils.data import TensorDataset

torch.manual_seed(0)


class Classification(Task):
    def compute_train_loss(self, batch, model, sample=False):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


data = TensorDataset(torch.randn(4, 8), torch.randint(0, 3, (4,)))
model = prepare_model(torch.nn.Sequential(torch.nn.Linear(8, 3)), Classification())
analyzer = Analyzer("demo", model, Classification(), cpu=True, disable_tqdm=True)
analyzer.fit_all_factors("identity", data, 4, factor_args=FactorArguments(strategy="identity"))


def compute():
    return analyzer.compute_pairwise_scores(
        "scores", "identity", data, data, per_device_query_batch_size=4, per_device_train_batch_size=4
    )


print("torch", torch.__version__)
first = compute()
print("first call:", first)
second = compute()["all_modules"]
print("second call:", tuple(second.shape))
with torch.no_grad():
    for value in model.parameters():
        value += torch.randn_like(value)
third = compute()["all_modules"]
print("equal with other weights:", torch.equal(second, third))
assert first is None and torch.equal(second, third), "the behaviour has changed"
PYTHON
