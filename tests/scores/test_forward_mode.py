"""The fast alignment pass against `torch.func.jvp`, in float64.

On a GPU, its faster arithmetic is also compared with exact float32.
"""

from __future__ import annotations

import copy

import pytest
import torch
from networks import as_trained, batch
from torch import Tensor, nn

from raypipe.proxies.networks import build_network
from raypipe.scores import forward_mode
from raypipe.scores.forward_mode import Aligner
from raypipe.scores.moso import alignments, gradient_sum
from raypipe.scores.per_sample import norms_and_alignments
from raypipe.vision.precision import use_precision

TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2}
"""Largest difference from eager float32 in units of the largest alignment."""


class Unusual(nn.Module):
    """Everything a graph can contain that a residual network does not.

    Tied weights, a layer that runs twice, a bare parameter, a frozen one, a norm layer on its own,
    reflected padding, grouped and strided kernels, methods, and functions with options.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.after = nn.BatchNorm2d(8)
        self.tied = nn.Conv2d(8, 8, 1)
        self.again = nn.Conv2d(8, 8, 1)
        self.again.weight = self.tied.weight
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.layer_norm = nn.LayerNorm(8)
        self.drop, self.relu = nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.norm(pixels.to(self.scale.dtype) / 255)
        x = self.twice(torch.relu(self.first(x)))
        x = self.after(self.twice(x))
        y = self.relu(x)
        x = torch.add(self.tied(y), self.again(y)) * self.scale
        x = torch.nn.functional.silu(x + y)
        x = torch.max_pool2d(x, kernel_size=2).mean((2, 3))
        x = self.drop(self.layer_norm(x.view(x.size(0), -1)))
        return self.head(self.frozen(x) + x)


class Branching(nn.Module):
    """Python code branches on values, so it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.head.weight.dtype).flatten(1)
        return self.head(x / 255 if float(x.max()) > 1 else x)


class Overwriting(Branching):
    """Uses a value after changing it in place: its graph alone would be another function."""

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.head(pixels.to(self.head.weight.dtype).flatten(1) / 255 - 0.5)
        return torch.nn.functional.relu(x, inplace=True) + x


OWN = {"unusual": Unusual, "branching": Branching, "overwriting": Overwriting}


def _network(name: str, size: int = 16) -> nn.Module:
    torch.manual_seed(3)
    model = OWN[name]() if name in OWN else build_network(name, 5, size)
    return as_trained(model)


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [
        ("small", False),
        ("small", True),
        ("resnet18", True),
        ("unusual", False),
        ("unusual", True),
        ("branching", True),
        ("overwriting", True),
    ],
)
def test_agrees_with_jvp(name: str, channels_last: bool) -> None:
    model, (images, labels) = _network(name).double(), batch(5, 16)
    direction = gradient_sum(model, images, labels)
    direction |= {
        key: torch.zeros_like(value)
        for key, value in model.named_parameters()
        if key not in direction
    }
    expected = alignments(model, direction, images, labels)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    aligner = Aligner(model, direction, channels_last=channels_last)
    assert aligner.traced == (name not in ("branching", "overwriting"))
    for _ in range(2):
        torch.testing.assert_close(
            aligner(images, labels), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item()
        )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_compiled_graph_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the graph passed to the compiler, without the compiler, which takes a minute."""
    compiled_graphs: list[object] = []
    monkeypatch.setattr(
        forward_mode.torch, "compile", lambda graph, **_: compiled_graphs.append(graph) or graph
    )
    model, (images, labels) = _network("small").double(), batch(6, 16)
    direction = gradient_sum(model, images, labels)
    aligner = Aligner(model, direction, compiled=True)
    expected = alignments(model, direction, images, labels)
    torch.testing.assert_close(aligner(images[:4], labels[:4]), expected[:4], rtol=1e-9, atol=1e-9)
    # another shape: not compiled
    torch.testing.assert_close(aligner(images[4:], labels[4:]), expected[4:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(aligner(images[2:], labels[2:]), expected[2:], rtol=1e-9, atol=1e-9)
    assert len(compiled_graphs) == 1


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float16"), use_precision("float16", "cpu"):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_gpu_paths_agree_with_eager_float32(
    precision: str, channels_last: bool, compiled: bool
) -> None:
    model, (images, labels) = (
        _network("resnet18", 32).cuda(),
        [value.cuda() for value in batch(64, 32)],
    )
    with use_precision("float32", "cuda"):
        direction = gradient_sum(model, images, labels)
        expected = alignments(model, direction, images, labels)
    with use_precision(precision, "cuda"):
        fast = copy.deepcopy(model).to(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        own = gradient_sum(fast, images, labels)
        actual = Aligner(fast, direction, channels_last=channels_last, compiled=compiled)(
            images, labels
        )
        squares, dots = norms_and_alignments(fast, images, labels, direction)
    scale, tolerance = expected.abs().max(), TOLERANCE[precision]
    assert (actual - expected).abs().max() < tolerance * scale
    assert (dots - expected).abs().max() < tolerance * scale
    for key, value in direction.items():
        assert (own[key] - value).norm() < tolerance * value.norm() + 1e-6 * scale, key
    assert torch.isfinite(squares).all()
