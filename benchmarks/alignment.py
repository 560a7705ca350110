"""What a sample's alignment with a direction costs: ours, with the self term, and the ways others do it.

    python benchmarks/alignment.py [--device cpu|cuda] [--precision float32|tf32|bfloat16] [--compile] [--threads 1] [--repeats 3] [--quick]
                                   [--keep-memory] [--kinds]

Prints one table per network: milliseconds per image, ratio to a plain forward pass (of the network as it is built, channels first),
peak memory above the network's own, and the largest difference from one-at-a-time, in units of the largest alignment. Both ways of
one sample at a time take batches of one image with one backward pass each; `lean` multiplies gradients with the direction layer by
layer, `as published` does what the published MoSo code does (github.com/hrtan/MoSo, scoring.py, `MoSo_scoring_exact`): copies them to one
vector, and computes three products over all parameters. Its mean gradient is a running mean of such vectors. Times are the least of
the repeats; every method sees the same images. What is made once per checkpoint (folding BatchNorm, compiling) is not timed.
With --kinds it prints instead one line for each of `KINDS`: what the mean gradient, the alignment and the self term cost, as a multiple
of a forward pass, and whether the network's graph serves (otherwise `torch.func.jvp` differentiates it as a whole). Networks of timm
need the package.
With --keep-memory the process keeps the memory it frees, as raypipe's workers do (`raypipe.vision.devices.set_threads`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import platform
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from plain_alignments import one_at_a_time, published
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from raypipe.plugins import code_allowed
from raypipe.proxies.networks import build_network
from raypipe.scores.forward_mode import Aligner
from raypipe.scores.moso import alignments, gradient_sum, parameters_of
from raypipe.scores.per_sample import norms_and_alignments
from raypipe.vision.devices import set_threads
from raypipe.vision.precision import use_precision

NETWORKS = (("resnet18", 32, 1000, 32, 8), ("resnet50", 64, 1000, 16, 4))
"""Name, image size, classes, batch, and images that the slow ways are timed on."""
KINDS = (
    ("resnet18", 64),
    ("torchvision:convnext_tiny", 64),
    ("torchvision:efficientnet_b0", 64),
    ("torchvision:vit_b_16", 64),
    ("torchvision:swin_t", 64),
    ("timm:vit_tiny_patch16_224", 64),
    ("alignment:gated", 64),
)
"""Networks of all kinds, and image sizes."""
KINDS_BATCH = 16


class Gate(nn.Module):
    """A layer that no library knows: a learned gate for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.scale * x)


def gated(classes: int, image_size: int, channels: int) -> nn.Module:
    """A module of one's own, as `module:function` names it."""
    widths = (channels, 32, 64, 128)
    blocks = [
        layer
        for before, after in itertools.pairwise(widths)
        for layer in (nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), Gate(after))
    ]
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
    return nn.Sequential(*blocks, *pooled)


def forward(
    model: nn.Module, images: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(images), labels, reduction="none")


def forward_backward(
    model: nn.Module, images: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    gradient_sum(model, images, labels)
    return torch.zeros(len(images))


def plain_jvp(
    model: nn.Module, images: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    return alignments(model, direction, images, labels)


def with_self_term(
    model: nn.Module, images: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    return norms_and_alignments(model, images, labels, direction)[1]


def vmap_grad(
    model: nn.Module, images: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(
            functional_call(model, {**parameters, **buffers}, (image[None],)), label[None]
        )

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters_of(model), images, labels)
    return sum(
        (value.flatten(1) @ direction[name].flatten() for name, value in gradients.items()),
        torch.zeros(()),
    )


def published_mean(
    model: nn.Module, images: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    parameters, mean = list(model.parameters()), torch.zeros(())
    for index in range(len(images)):
        loss = F.cross_entropy(model(images[index : index + 1]), labels[index : index + 1])
        own = nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters)).detach()
        mean = mean * index / (index + 1) + own / (index + 1)
    return torch.zeros(len(images))


METHODS: dict[str, tuple[Callable[..., Tensor], str, bool]] = {
    "forward": (forward, "plain", False),
    "forward, channels last": (forward, "last", False),
    "forward + backward": (forward_backward, "plain", False),
    "ours: mean gradient": (forward_backward, "last", False),
    "torch.func.jvp": (plain_jvp, "plain", False),
    "ours: alignment": (plain_jvp, "aligner", False),
    "ours: alignment + self term": (with_self_term, "last", False),
    "vmap(grad)": (vmap_grad, "plain", True),
    "one at a time, lean": (one_at_a_time, "plain", True),
    "one at a time, as published": (published, "plain", True),
    "mean gradient, as published": (published_mean, "plain", True),
}
"""Each with what it runs on (the network as built, channels last, or an Aligner of it) and whether it is timed on fewer images."""


class Memory:
    """Highest memory of this process, or of the GPU, above what it was."""

    def __init__(self, device: str) -> None:
        self._device, self._over, self.peak = device, threading.Event(), 0

    def __enter__(self) -> Memory:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        import psutil  # a machine with a GPU need not have it

        process = psutil.Process()
        self._start = process.memory_info().rss

        def watch() -> None:
            while not self._over.wait(0.005):
                self.peak = max(self.peak, process.memory_info().rss - self._start)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device == "cuda":
            self.peak = torch.cuda.max_memory_allocated() - self._start
            return
        self._over.set()
        self._thread.join()


def measure(run: Callable[[], Tensor], device: str, repeats: int) -> tuple[float, int, Tensor]:
    """Least seconds, bytes, result."""
    with Memory(device) as memory:
        result = run()
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best, memory.peak, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", default="float32", choices=["float32", "tf32", "bfloat16"], help="on a GPU"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile our alignment")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--batch", type=int, help="images in a batch; default 32 and 16, on a GPU 512 and 256"
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="instead of giving it back to the system after each batch",
    )
    parser.add_argument("--kinds", action="store_true", help="one line for each kind of network")
    parser.add_argument("--quick", action="store_true", help="the first network only")
    arguments = parser.parse_args()
    (set_threads if arguments.keep_memory else torch.set_num_threads)(arguments.threads)
    device = arguments.device
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()}, {arguments.threads} thread(s)"
    )
    arithmetic = arguments.precision if device == "cuda" else "float32"
    compiled = ", alignment compiled" * arguments.compile + ", memory kept" * arguments.keep_memory
    print(
        f"{machine}; torch {torch.__version__}, {arithmetic}{compiled}, seed 0, least of {arguments.repeats}"
    )
    with use_precision(arguments.precision, device):
        (kinds if arguments.kinds else tables)(arguments, device)


def kinds(arguments: argparse.Namespace, device: str) -> None:
    batch = arguments.batch or KINDS_BATCH
    print(f"\n100 classes, batch {batch}; x forward: multiples of a forward pass, channels last")
    print(
        f"{'':<34}{'ms / image':>12}{'mean gradient':>15}{'alignment':>12}{'+ self term':>13}{'difference':>12}  graph"
    )
    for name, size in KINDS:
        torch.manual_seed(0)
        with code_allowed():
            model = build_network(name, 100, size).to(device).eval()
        with torch.no_grad():  # some heads start at zero, and then nothing else has a gradient
            model.head.weight.normal_(0, 0.02)
        model = model.to(memory_format=torch.channels_last)
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)
        labels = torch.randint(0, 100, (batch,)).to(device)
        given = model, images, labels
        direction = {key: value / batch for key, value in gradient_sum(*given).items()}
        aligner = Aligner(model, direction)
        runs = (
            functools.partial(forward, *given, direction),
            functools.partial(forward_backward, *given, direction),
            functools.partial(aligner, images, labels),
            functools.partial(with_self_term, *given, direction),
        )
        measured = [measure(run, device, arguments.repeats) for run in runs]
        plain, *others = (seconds / batch for seconds, _, _ in measured)
        fast, slow = measured[2][2], measured[3][2]
        difference = ((fast - slow).abs().max() / slow.abs().max()).item()
        multiples = "".join(
            f"{each / plain:>{width}.2f}" for each, width in zip(others, (15, 12, 13), strict=True)
        )
        print(
            f"{name + ' at ' + str(size):<34}{plain * 1e3:>12.2f}{multiples}{difference:>12.1e}  {'yes' if aligner.traced else 'no'}",
            flush=True,
        )


def tables(arguments: argparse.Namespace, device: str) -> None:
    for name, size, classes, batch, few in NETWORKS[: 1 if arguments.quick else None]:
        batch = arguments.batch or (batch * 16 if device == "cuda" else batch)
        few = min(batch, few * 16 if device == "cuda" else few)
        torch.manual_seed(0)
        model = build_network(name, classes, size).to(device).eval()
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)
        labels = torch.randint(0, classes, (batch,)).to(device)
        direction = {
            key: value / batch for key, value in gradient_sum(model, images, labels).items()
        }
        reference = one_at_a_time(model, images[:few], labels[:few], direction)
        scale = reference.abs().max()
        aligner = Aligner(model, direction, compiled=arguments.compile)
        runs = {"plain": model, "last": copy.deepcopy(model).to(memory_format=torch.channels_last)}
        print(
            f"\n{name} at {size} x {size}, {classes} classes, batch {batch} (the last four rows: {few})"
        )
        print(f"{'':<30}{'ms / image':>12}{'x forward':>12}{'peak MiB':>12}{'difference':>14}")
        plain = 0.0
        for label, (method, on, slow) in METHODS.items():
            count = few if slow else batch
            part = images[:count], labels[:count]
            run = (
                functools.partial(aligner, *part)
                if on == "aligner"
                else functools.partial(method, runs[on], *part, direction)
            )
            seconds, peak, result = measure(run, device, arguments.repeats)
            each = seconds / count
            plain = plain or each
            compared = method not in (forward, forward_backward, published_mean)
            difference = (
                f"{((result[:few] - reference).abs().max() / scale).item():.1e}" if compared else ""
            )
            print(
                f"{label:<30}{each * 1e3:>12.3f}{each / plain:>12.2f}{peak / 2**20:>12.0f}{difference:>14}",
                flush=True,
            )


if __name__ == "__main__":
    main()
