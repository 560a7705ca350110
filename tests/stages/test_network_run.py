"""Whole runs with a network of the user's own, from a file in the folder where raypipe starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forked_command import ForkedCommand
from helpers import small_config
from safetensors.torch import save_file

from raypipe.config import dump_config
from raypipe.runs.run import Run

pytestmark = pytest.mark.ray

NETWORK = """
from torch import nn
from shared_layers import Gate

class Net(nn.Module):
    def __init__(self, classes, image_size, channels):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm, self.gate, self.out = nn.LayerNorm(8), Gate(), nn.Linear(8, classes)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.gate(self.norm(x)).mean(1))
"""
LAYERS = """
import torch
from torch import nn

class Gate(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid({factor} * x)
"""


def _raypipe(folder: Path, *arguments: str) -> ForkedCommand:
    """The command in a process of its own, as a user starts it: its folder is not on the path."""
    command = ForkedCommand(arguments, folder, folder / "printed.txt")
    command.wait(timeout=280)
    return command


def test_a_module_in_the_current_folder_is_a_proxy(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(NETWORK)
    (tmp_path / "shared_layers.py").write_text(LAYERS.format(factor=1))
    weights = {"stem.weight": torch.randn(8, 3, 2, 2), "stem.bias": torch.zeros(8)}
    save_file(weights, tmp_path / "stem.safetensors")
    overrides = ["proxy.model=my_net:Net", "source.limit=300", "measure.scores=[moso, grand]"]
    config = small_config(str(tmp_path / "run"), *overrides)
    (tmp_path / "my.yaml").write_text(dump_config(config))
    set_weights = ("--set", f"proxy.weights={tmp_path}/stem.safetensors")
    refused = _raypipe(tmp_path, "run", "my.yaml", *set_weights)
    assert refused.poll() == 2, refused.printed
    assert "6 missing (attention.in_proj_weight" in refused.printed
    assert not (tmp_path / "run" / "seed").exists(), "nothing was done before it was refused"
    done = _raypipe(tmp_path, "run", "my.yaml", "--until", "embed")
    assert done.poll() == 0, done.printed
    run = Run(str(tmp_path / "run"))
    assert run.record("embed").samples == 300
    hashes = [run.record("proxy").fingerprint]
    (tmp_path / "shared_layers.py").write_text(LAYERS.format(factor=2))
    changed = _raypipe(tmp_path, "run", "my.yaml", "--until", "proxy")
    assert changed.poll() == 0, changed.printed
    assert "the code of proxy.model my_net:Net has changed" in changed.printed
    hashes.append(run.record("proxy").fingerprint)
    assert hashes[0] != hashes[1], "a change of a layer that the network uses counts"
    assert (
        json.loads((tmp_path / "run" / "proxy" / "proxy.json").read_text())["model"] == "my_net:Net"
    )
