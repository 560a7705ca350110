"""Networks that cannot be trained or measured are refused before a run does any work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import small_config

from raypipe.errors import ConfigError
from raypipe.plugins import code_allowed
from raypipe.runs.run import Run
from raypipe.stages.network_check import check_forward_mode, check_network

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, image_size, channels):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, 6), self.middle())
        self.out = nn.Linear(6, classes)
    def middle(self):
        return nn.Tanh()
    def forward(self, x):
        return self.out(self.body(x))

class BatchStatistics(Net):
    def middle(self):
        return nn.BatchNorm1d(6, track_running_stats=False)

class Mixes(Net):
    def forward(self, x):
        return super().forward(x - x.mean(0))

class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()
    @staticmethod
    def backward(ctx, gradient):
        return gradient

class Rounding(nn.Module):
    def forward(self, x):
        return Sign.apply(x)

class Rounds(Net):
    def middle(self):
        return Rounding()

class Doubles(torch.autograd.Function):
    generate_vmap_rule = True
    @staticmethod
    def forward(x):
        return x.sin()
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0].cos()
    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()

class Doubling(nn.Module):
    def forward(self, x):
        return Doubles.apply(x)

class Disagrees(Net):
    def middle(self):
        return Doubling()

class Steep(nn.Module):
    def forward(self, x):
        return x * 0 + x.detach().clamp(0).sqrt() * 0 + (x * 0).sqrt()

class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()

class Norms(Net):
    def middle(self):
        return Activated(6)

class Spare(Net):
    def middle(self):
        self.spare = nn.Parameter(torch.zeros(3))
        return nn.Tanh()

class Frozen(Net):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.requires_grad_(False)

class Half(Net):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.half()

class Detached(Net):
    def forward(self, x):
        return self.out(self.body(x).detach())

class FailsInTraining(Net):
    def forward(self, x):
        assert not self.training, "no training"
        return super().forward(x)

class InfiniteGradient(Net):
    def middle(self):
        return Steep()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run folder without a run; networks in the current folder can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets_checked.py").write_text(NETWORKS)
    with code_allowed():
        yield Run(str(tmp_path / "run"))
    sys.modules.pop("nets_checked", None)


def _check(run: Run, network: str, *settings: str) -> None:
    config = small_config(run.uri, f"proxy.model=nets_checked:{network}", *settings)
    check_network(config, run)
    check_forward_mode(config, run)


def test_a_sound_network_passes(run: Run) -> None:
    _check(run, "Net")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            "Mixes",
            "proxy.model: the outputs of nets_checked:Mixes for an image depend on the other",
        ),
        ("BatchStatistics", r"cannot process a single image in eval mode \(ValueError: Expected"),
        ("InfiniteGradient", "proxy.model: the gradient of body.1.weight of .* is not finite"),
        ("Half", r"nets_checked:Half cannot process images of 8 pixels \(RuntimeError: .*dtype"),
        ("Detached", "no weight of nets_checked:Detached but those of its last layer gets a"),
        (
            "Frozen",
            r"nets_checked:Frozen cannot be trained \(RuntimeError: .*does not require grad",
        ),
        (
            "FailsInTraining",
            r"cannot be trained \(AssertionError: no training, nets_checked.py line \d+\)",
        ),
        ("Rounds", r"forward: layer body.2 \(Rounding\): .*Set measure.moso.gradient to head"),
        ("Disagrees", r"the derivative is \S+ forward and \S+ backward, so a layer defines its"),
    ],
)
def test_what_is_wrong_is_one_line(run: Run, network: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _check(run, network)
    assert "\n" not in str(caught.value)


def test_several_workers_share_the_statistics_of_every_batchnorm(run: Run) -> None:
    _check(run, "Norms")
    with pytest.raises(ConfigError, match=r"statistics of layer body.2 \(Activated\); set proxy"):
        _check(run, "Norms", "proxy.workers=2")
    _check(run, "Norms", "proxy.workers=2", "proxy.freeze=norm")


def test_several_workers_need_every_weight(run: Run) -> None:
    _check(run, "Spare")
    with pytest.raises(ConfigError, match=r"its weight spare, .*set proxy.workers to 1"):
        _check(run, "Spare", "proxy.workers=2")


@pytest.mark.parametrize(
    "setting",
    ["measure.scores=[el2n]", "measure.moso.gradient=head", "measure.moso.self_term=true"],
)
def test_forward_mode_is_required_only_where_it_is_used(run: Run, setting: str) -> None:
    with pytest.raises(ConfigError, match="cannot be differentiated forward"):
        _check(run, "Rounds")
    _check(run, "Rounds", setting)
