"""Adversarial examples by projected gradient descent (PGD), for training and evaluation.

With the l_inf norm, for a loss l, a label y and a ball of radius eps around the image x:

    x_0     = x + a random point of the ball,      or x itself
    x_{t+1} = clip to [x - eps, x + eps] and to [0, 1] of   x_t + step * sign( grad_x l(x_t, y) )

Pixels range from 0 to 255 here, as everywhere in raypipe. The settings eps and step are relative to
pixels from 0 to 1, so they are multiplied by 255. Normalisation is part of the attacked network.

The network is attacked in eval mode, as in the code of TRADES (Zhang et al. 2019): BatchNorm uses
its running averages. So an example does not depend on the rest of its batch, nor on how a batch
is split among workers, and the running averages see only the images that are trained on. Training
then uses the examples in train mode.

No Ray, no storage.

References
----------
Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018
(arXiv 1706.06083).
Zhang et al. 2019, TRADES (arXiv 1901.08573).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypipe.config import AdversarySettings


def starting_points(shape: Sequence[int], *key: int) -> np.ndarray:
    """Return random starting points of attacks within the ball.

    Parameters
    ----------
    shape : Sequence[int]
        Shape of the images, [n, 3, size, size].
    *key : int
        Seed, epoch and step. The draw depends on nothing else.

    Returns
    -------
    np.ndarray
        uint8 of the given shape; 0 to 255 stand for -eps to eps.
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
    """Return images within eps of the given ones on which the loss is higher.

    Parameters
    ----------
    model : callable
        Maps pixels [n, 3, size, size] from 0 to 255, uint8 or float32, to logits [n, classes]. An
        `nn.Module` is put into eval mode during the attack; its gradients are not changed.
    pixels : Tensor
        uint8 or float32 [n, 3, size, size].
    label : Tensor
        int64 [n].
    settings : AdversarySettings
        Radius, step size and number of iterations.
    start : np.ndarray, optional
        Result of `starting_points`, [n, 3, size, size]. None starts at the images themselves.
    bfloat16 : bool
        Run the passes through the model in mixed precision. Steps and bounds stay float32.

    Returns
    -------
    Tensor
        float32 with the shape of `pixels`, values from 0 to 255.
    """
    clean = pixels.detach().float()
    radius, step = 255 * settings.eps, 255 * settings.step_size
    low, high = (clean - radius).clamp_(min=0), (clean + radius).clamp_(max=255)
    examples = clean
    if start is not None:
        offset = torch.from_numpy(start).to(clean.device).float().div_(127.5).sub_(1).mul_(radius)
        examples = torch.clamp(clean + offset, low, high)
    with _in_eval_mode(model):
        for _ in range(settings.iterations):
            examples = examples.detach().requires_grad_()
            with (
                torch.enable_grad(),
                torch.autocast(clean.device.type, torch.bfloat16, enabled=bfloat16),
            ):
                logits = model(examples)
                loss = F.cross_entropy(logits.float(), label, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, examples)
            examples = torch.clamp(examples.detach() + step * gradient.sign(), low, high)
    return examples.detach()


@contextmanager
def _in_eval_mode(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put a module into eval mode and restore its mode afterwards; ignore other callables."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
