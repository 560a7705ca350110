"""Self-supervised training on images alone: SimCLR.

A batch contains two random views of each of N images; z are their projections scaled to length 1,
tau is the temperature. The loss of view i, whose other view is j, is (Eq. 1)

    -log( exp(<z_i, z_j> / tau) / sum over k != i of exp(<z_i, z_k> / tau) ),    k over all 2N views

and its mean over all views is minimised. Clusters are found not in z but in the embedding before
the projection (section 4.2).

SimCLR is chosen for small sets and little compute: the other views push apart what would otherwise
collapse into one point, so it needs neither a second network nor a schedule tuned to the set. Views
are those of the paper for CIFAR-10 (appendix B.9: no blur), except that the order of the colour
changes is fixed and hue is rotated in YIQ.

Everything random derives from (seed, epoch, step). A training that resumes from a saved state gives
the same result as one without interruption.

References
----------
Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations"
(arXiv 2002.05709).
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
from raypipe.proxies.networks import ProxyNet, build_network
from raypipe.vision import training
from raypipe.vision.devices import to_device

PROJECTION_WIDTH = 128
"""Length of z."""
MIN_AREA = 0.2
"""Lower bound of a view's share of the image's area; its aspect ratio is from 3/4 to 4/3."""
MAX_JITTER = 0.4
"""Largest relative change of brightness, contrast and saturation."""
JITTER_PROBABILITY = 0.8
"""Share of views whose colours change."""
GREY_PROBABILITY = 0.2
"""Share of views that become grey."""
MAX_HUE_TURN = 0.1
"""Largest rotation of the hue in either direction, in turns."""
WEIGHT_DECAY = 1e-4
"""Weight decay of AdamW."""

_LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def pretext_network(
    model: str, image_size: int, mean: Sequence[float], std: Sequence[float], seed: int
) -> ProxyNet:
    """Return a network with fresh weights whose head is the projection.

    The projection has one hidden layer (section 4.2).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(model, 1, image_size, mean, std)
        width = network.head.in_features
        projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION_WIDTH)
        )
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
    is_due: Callable[[], bool] = lambda: False,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train a network of `pretext_network` in place.

    Parameters
    ----------
    network : ProxyNet
        Trained in place, then put into eval mode.
    images : np.ndarray
        uint8 [n, 3, size, size].
    settings : PseudoLabelSettings
        Epochs, batch size, learning rate, temperature and seed.
    flip : bool
        Whether views can be mirrored.
    device : str
        Where to train.
    state : dict[str, Tensor], optional
        A state passed to `save`, to resume from.
    save : callable
        Called with the state at the end of every epoch, and after a batch if `is_due`.
    is_due : callable
        Called after every batch.
    step : callable
        Called with the epochs done and their total, also for epochs before `state`.

    Raises
    ------
    RaypipeError
        If the loss is not finite.
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
    optimizer = training.make_optimizer(plan, network)
    per_epoch = training.steps_per_epoch(len(images), plan.batch_size)
    done = 0  # batches
    if state is not None:
        done = int(state["batches"])
        training.restore_training(
            {name: value for name, value in state.items() if name != "batches"}, network, optimizer
        )
    network.train()
    for epoch in range(plan.passes):
        batches = training.epoch_batches(len(images), plan.batch_size, settings.seed, epoch)
        for number, rows in enumerate(batches):
            if epoch * per_epoch + number < done:
                continue
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate(plan, done, per_epoch * plan.passes)
            _train_batch(network, optimizer, images[rows], settings, flip, epoch, number)
            done += 1
            if number == per_epoch - 1 or is_due():
                save(training.training_state(network, optimizer) | {"batches": torch.tensor(done)})
        step(epoch + 1, plan.passes)
    network.eval()


def _train_batch(
    network: ProxyNet,
    optimizer: torch.optim.Optimizer,
    images: np.ndarray,
    settings: PseudoLabelSettings,
    flip: bool,
    epoch: int,
    number: int,
) -> None:
    """Take one step; raise RaypipeError if the loss is not finite."""
    device = next(network.parameters()).device
    random = np.random.default_rng([settings.seed, epoch, 1 + number])
    pixels = to_device(images, device)
    both = torch.cat([random_views(pixels, flip, random), random_views(pixels, flip, random)])
    loss = contrastive_loss(
        network(both.contiguous(memory_format=torch.channels_last)),
        settings.temperature,
    )
    if not torch.isfinite(loss):
        raise RaypipeError(
            f"the self-supervised loss is {loss.item()} in epoch {epoch + 1}; lower "
            f"pseudo_labels.lr (now {settings.lr:g})"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def contrastive_loss(projected: Tensor, temperature: float) -> Tensor:
    """Return the mean of Eq. 1 over 2N views.

    Parameters
    ----------
    projected : Tensor
        Float [2N, d]; rows i and N + i are views of one image.
    temperature : float
        tau.
    """
    unit = F.normalize(projected, dim=1)
    similarity = unit @ unit.T / temperature
    similarity.fill_diagonal_(-math.inf)
    count = len(projected)
    other_view = (torch.arange(count, device=projected.device) + count // 2) % count
    return F.cross_entropy(similarity, other_view)


def random_views(pixels: Tensor, flip: bool, random: np.random.Generator) -> Tensor:
    """Return one random view of each image, float [n, 3, size, size] within 0..255.

    Parameters
    ----------
    pixels : Tensor
        uint8 [n, 3, size, size].
    flip : bool
        Whether a view can be mirrored.
    random : np.random.Generator
        The order of its draws is part of the result.
    """
    count, device = len(pixels), pixels.device

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(random.uniform(low, high, (count, 1, 1, 1)).astype(np.float32)).to(
            device
        )

    area, ratio = draw(MIN_AREA, 1), draw(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    across, down, mirrored = draw(-1, 1), draw(-1, 1), draw(0, 1) < (0.5 if flip else 0)
    zero = torch.zeros_like(width)
    crop = torch.cat(  # affine maps, [n, 2, 3]
        [
            torch.cat([torch.where(mirrored, -width, width), zero, across * (1 - width)], 3),
            torch.cat([zero, height, down * (1 - height)], 3),
        ],
        2,
    )[:, 0]
    grid = F.affine_grid(crop, list(pixels.shape), align_corners=False)
    cropped = F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
    return _recoloured(cropped, draw).clamp(0, 1) * 255


def _recoloured(pixels: Tensor, draw: Callable[[float, float], Tensor]) -> Tensor:
    """Change brightness, contrast, saturation and hue of most images, and turn some grey.

    `pixels` is float [n, 3, size, size] within 0..1, `draw` returns [n, 1, 1, 1] between two
    bounds.
    """
    luma = torch.tensor(_LUMA, device=pixels.device).view(1, 3, 1, 1)
    yiq = torch.tensor(_YIQ, device=pixels.device)
    # brightness, then contrast, then saturation
    changed = pixels * draw(1 - MAX_JITTER, 1 + MAX_JITTER)
    middle = (changed * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    changed = middle + (changed - middle) * draw(1 - MAX_JITTER, 1 + MAX_JITTER)
    grey = (changed * luma).sum(1, keepdim=True)
    changed = grey + (changed - grey) * draw(1 - MAX_JITTER, 1 + MAX_JITTER)
    # hue: a rotation in the IQ plane
    angle = 2 * math.pi * draw(-MAX_HUE_TURN, MAX_HUE_TURN).flatten()
    turn = torch.zeros(len(pixels), 3, 3, device=pixels.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 2, 1] = angle.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    changed = torch.einsum("nij,njhw->nihw", torch.linalg.inv(yiq) @ turn @ yiq, changed)
    pixels = torch.where(draw(0, 1) < JITTER_PROBABILITY, changed, pixels)
    grey = (pixels * luma).sum(1, keepdim=True).expand_as(pixels)
    return torch.where(draw(0, 1) < GREY_PROBABILITY, grey, pixels)
