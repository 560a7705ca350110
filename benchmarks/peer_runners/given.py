"""What every way of computing alignments is given: a network, images, a vector and the exact answer.

    python given.py NETWORK SIZE IMAGES FILE

writes them to a safetensors file. The vector is the sum of the gradients of the first `QUERIES` images,
because some packages only take images and compute the vector themselves. It and the answer, the
alignment of every image's gradient with it, come from a loop over the images in float64. BatchNorm
has the statistics of random images, and the network is in eval mode.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CLASSES, QUERIES = 100, 2
CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class Given:
    """Attributes: see the module.

    `queries` are the images, and their labels, whose gradients add up to `vector`. The vector has
    the names and the order of the parameters.
    """

    network: nn.Module
    images: Tensor
    labels: Tensor
    queries: tuple[Tensor, Tensor]
    vector: dict[str, Tensor]

    def first(self, count: int) -> Given:
        """Return the same with the first images only."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])


def build(name: str, size: int) -> nn.Module:
    """Return a ResNet of torchvision in eval mode, with raypipe's stem for small images."""
    network = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    network.conv1 = nn.Conv2d(3, 64, 3, 1 if size < 48 else 2, 1, bias=False)
    network.maxpool = nn.Identity()
    return network.eval()


def load(file: str) -> Given:
    with safe_open(file, "pt") as stored:
        described = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    network = build(described["network"], int(described["size"]))
    prefix = "weights."
    network.load_state_dict(
        {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
    )
    vector = {name: tensors[f"vector.{name}"] for name, _ in network.named_parameters()}
    images, labels = tensors["images"], tensors["labels"]
    return Given(network, images, labels, (images[:QUERIES], labels[:QUERIES]), vector)


def answers(file: str) -> dict[bool, Tensor]:
    """Return the exact alignments over all parameters (True), and without BatchNorm (False)."""
    with safe_open(file, "pt") as stored:
        return {True: stored.get_tensor("exact"), False: stored.get_tensor("exact_without_norm")}


def gradient(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the summed loss by the name of the parameter."""
    named = dict(network.named_parameters())
    loss = F.cross_entropy(network(images), labels, reduction="sum")
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def write(name: str, size: int, images: int, file: str) -> None:
    torch.manual_seed(0)
    network = build(name, size)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the statistics of the batch, not a running mean
    with torch.no_grad():
        network.train()(torch.randn(CALIBRATION_IMAGES, 3, size, size))
    network.eval()
    pixels, labels = torch.randn(images, 3, size, size), torch.randint(0, CLASSES, (images,))
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    norms = {
        f"{layer}.{key}"
        for layer, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key, _ in module.named_parameters()
    }

    exact = network.double()
    vector = {
        key: value.float().double()
        for key, value in gradient(exact, pixels[:QUERIES].double(), labels[:QUERIES]).items()
    }
    answer, without_norm = [], []
    for row in range(images):
        own = gradient(exact, pixels[row : row + 1].double(), labels[row : row + 1])
        parts = {key: (value * vector[key]).sum() for key, value in own.items()}
        answer.append(sum(parts.values()))
        without_norm.append(sum(value for key, value in parts.items() if key not in norms))

    tensors = {
        "images": pixels,
        "labels": labels,
        "exact": torch.stack(answer),
        "exact_without_norm": torch.stack(without_norm),
    }
    tensors |= {f"weights.{key}": value for key, value in weights.items()}
    tensors |= {f"vector.{key}": value.float() for key, value in vector.items()}
    save_file(tensors, file, {"network": name, "size": str(size)})


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
