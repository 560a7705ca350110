"""Adversarial examples by projected gradient descent, for adversarial training and for judging what is robust. No Ray, no storage.

Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018 (arXiv 1706.06083), in the l_inf norm:

    x_0     = x + a random point of the ball,      or x itself
    x_{t+1} = clip to [x - eps, x + eps] and to [0, 1] of   x_t + step * sign( grad_x loss(x_t, y) )

Balls are in pixel space: pixels go from 0 to 255 here, as everywhere in raypipe, and eps and step, which are of pixels from 0 to 1, are
multiplied by 255. Whatever normalises the pixels is part of the network that is attacked.

The network is attacked in eval mode, as the code of TRADES does (Zhang et al. 2019, arXiv 1901.08573): BatchNorm by its running averages. So an
example depends on no other of its batch, nor on how a batch is shared among workers, and running averages see no images but those that are
trained on. Training then goes on with the examples in train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypipe.config import AdversarySettings


def starting_points(shape: Sequence[int], *key: int) -> np.ndarray:
    """Where in the ball attacks begin: uint8, 0 to 255 for -eps to eps of each value.

    key  what the draw depends on, and nothing else: seed, epoch, step
    """
    return np.random.default_rng(key).integers(0, 256, tuple(shape), np.uint8)


def attack(
    model: Callable[[Tensor], Tensor],
    pixels: Tensor,
    label: Tensor,
    settings: AdversarySettings,
    start: np.ndarray | None = None,
    *,
    bfloat16: bool = False,
) -> Tensor:
    """Images within eps of the given ones on which the loss is higher: float32, shape of `pixels`, values from 0 to 255.

    model     logits [n, classes] of pixels [n, 3, size, size] from 0 to 255, uint8 or float32; an `nn.Module` is in eval mode meanwhile,
              and its gradients are left alone
    pixels    uint8 or float32 [n, 3, size, size];  label  int64 [n]
    start     of `starting_points`, [n, 3, size, size]; None: the images themselves
    bfloat16  the passes through the model in mixed precision; steps and bounds are float32
    """
    clean = pixels.detach().float()
    reach, step = 255 * settings.eps, 255 * settings.step_size
    low, high = (clean - reach).clamp_(min=0), (clean + reach).clamp_(max=255)
    found = clean
    if start is not None:
        moved = torch.from_numpy(start).to(clean.device).float().div_(127.5).sub_(1).mul_(reach)
        found = torch.clamp(clean + moved, low, high)
    network = model if isinstance(model, nn.Module) else None
    training = network is not None and network.training
    if network is not None:
        network.eval()
    try:
        for _ in range(settings.iterations):
            found = found.detach().requires_grad_()
            with (
                torch.enable_grad(),
                torch.autocast(clean.device.type, torch.bfloat16, enabled=bfloat16),
            ):
                logits = model(found)
                loss = F.cross_entropy(logits.float(), label, reduction="sum")
            (slope,) = torch.autograd.grad(loss, found)
            found = torch.clamp(found.detach() + step * slope.sign(), low, high)
    finally:
        if network is not None:
            network.train(training)
    return found.detach()
