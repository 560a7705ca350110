"""Self-supervised training on images alone: SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations", arXiv 2002.05709).

Two random views of each of N images in a batch, z their projections scaled to length 1, tau the temperature. The loss of view i, whose
other view is j, is (Eq. 1)

    -log( exp(<z_i, z_j> / tau) / sum over k != i of exp(<z_i, z_k> / tau) ),    k over all 2N views

and its mean over all views is minimised. What clusters are sought in is not z but the embedding before the projection (section 4.2).

It is chosen for small sets and little compute: other views push apart what would otherwise collapse into one point, so that it needs
neither a second network nor a schedule tuned to the set. Views are as the paper has them for CIFAR-10 (appendix B.9: no blur), but for
the order of the colour changes, which is fixed, and hue, which is turned in YIQ.
Everything random derives from (seed, epoch, step); a training that goes on from a saved state gives what one without a break gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypipe.config import ProxySettings, PseudoLabelSettings
from raypipe.errors import RaypipeError
from raypipe.vision import training
from raypipe.vision.devices import to_device
from raypipe.vision.networks import ProxyNet, build

PROJECTED = 128
"""Length of z."""
LEAST_AREA = 0.2
"""A view is a random part of the image of at least this share of its area, and of an aspect ratio from 3/4 to 4/3."""
JITTER, JITTERED, GREY = 0.4, 0.8, 0.2
"""Brightness, contrast and saturation change by up to this factor either way; of so many views; so many are grey."""
HUE = 0.1
"""Turns of the hue, at most, either way."""
WEIGHT_DECAY = 1e-4

_LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def pretext(
    model: str, image_size: int, mean: Sequence[float], std: Sequence[float], seed: int
) -> ProxyNet:
    """A network with fresh weights whose head is the projection: one hidden layer (section 4.2)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(model, 1, image_size, mean, std)
        width = network.head.in_features
        projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTED))
    network.head = projection  # type: ignore[assignment]
    return network


def pretrain(
    network: ProxyNet,
    images: np.ndarray,
    settings: PseudoLabelSettings,
    *,
    flip: bool,
    device: str = "cpu",
    state: dict[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], None] = lambda state: None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train a network of `pretext` in place.

    images       uint8 [n, 3, size, size]
    flip         whether a view may be mirrored
    state, save  what `save` was given at the end of the last epoch, to go on from
    step         called with epochs done and in all
    Raises RaypipeError where the loss is not finite.
    """
    plan = ProxySettings(
        optimizer="adamw",
        lr=settings.lr,
        weight_decay=WEIGHT_DECAY,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        checkpoints=1,
    )
    network.to(device).to(memory_format=torch.channels_last)
    optimizer, first = training.make_optimizer(plan, network), 0
    if state is not None:
        first = int(state["epoch"]) + 1
        training.restore_training(
            {name: value for name, value in state.items() if name != "epoch"}, network, optimizer
        )
    per_epoch = training.steps_per_epoch(len(images), plan.batch_size)
    network.train()
    for epoch in range(plan.epochs):
        if epoch >= first:
            for number, rows in enumerate(
                training.epoch_batches(len(images), plan.batch_size, settings.seed, epoch)
            ):
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate(
                        plan, epoch * per_epoch + number, per_epoch * plan.epochs
                    )
                random = np.random.default_rng([settings.seed, epoch, 1 + number])
                pixels = to_device(images[rows], device)
                both = torch.cat([views(pixels, flip, random), views(pixels, flip, random)])
                loss = contrastive_loss(
                    network(both.contiguous(memory_format=torch.channels_last)),
                    settings.temperature,
                )
                if not torch.isfinite(loss):
                    raise RaypipeError(
                        f"the self-supervised loss is {loss.item()} in epoch {epoch + 1}; lower pseudo_labels.lr (now {settings.lr:g})"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            save(training.training_state(network, optimizer) | {"epoch": torch.tensor(epoch)})
        step(epoch + 1, plan.epochs)
    network.eval()


def contrastive_loss(projected: Tensor, temperature: float) -> Tensor:
    """Mean of Eq. 1 over 2N views; projected float [2N, d], of which rows i and N + i are views of one image."""
    unit = F.normalize(projected, dim=1)
    alike = unit @ unit.T / temperature
    alike.fill_diagonal_(-math.inf)
    count = len(projected)
    return F.cross_entropy(
        alike, (torch.arange(count, device=projected.device) + count // 2) % count
    )


def views(pixels: Tensor, flip: bool, random: np.random.Generator) -> Tensor:
    """One random view of each image: uint8 [n, 3, size, size] -> float [n, 3, size, size] within 0..255."""
    count, device = len(pixels), pixels.device

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(random.uniform(low, high, (count, 1, 1, 1)).astype(np.float32)).to(
            device
        )

    area, ratio = draw(LEAST_AREA, 1), draw(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    across, down, mirrored = draw(-1, 1), draw(-1, 1), draw(0, 1) < (0.5 if flip else 0)
    nothing = torch.zeros_like(width)
    moved = torch.cat(
        [
            torch.cat([torch.where(mirrored, -width, width), nothing, across * (1 - width)], 3),
            torch.cat([nothing, height, down * (1 - height)], 3),
        ],
        2,
    )[:, 0]
    grid = F.affine_grid(moved, list(pixels.shape), align_corners=False)
    seen = F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
    return _recoloured(seen, draw).clamp(0, 1) * 255


def _recoloured(seen: Tensor, draw: Callable[[float, float], Tensor]) -> Tensor:
    """Random brightness, contrast, saturation and hue of most images, and no colour at all of some."""
    luma = torch.tensor(_LUMA, device=seen.device).view(1, 3, 1, 1)
    yiq = torch.tensor(_YIQ, device=seen.device)
    changed = seen * draw(1 - JITTER, 1 + JITTER)
    middle = (changed * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    changed = middle + (changed - middle) * draw(1 - JITTER, 1 + JITTER)
    grey = (changed * luma).sum(1, keepdim=True)
    changed = grey + (changed - grey) * draw(1 - JITTER, 1 + JITTER)
    angle = 2 * math.pi * draw(-HUE, HUE).flatten()
    turn = torch.zeros(len(seen), 3, 3, device=seen.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 2, 1] = angle.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    changed = torch.einsum("nij,njhw->nihw", torch.linalg.inv(yiq) @ turn @ yiq, changed)
    seen = torch.where(draw(0, 1) < JITTERED, changed, seen)
    return torch.where(draw(0, 1) < GREY, (seen * luma).sum(1, keepdim=True).expand_as(seen), seen)
