"""Check a network on the driver, before a run does any work.

raypipe's own networks need no check, so that torch is not imported for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypipe.config import Config
from raypipe.config.choices import PROXY_MODELS
from raypipe.errors import ConfigError
from raypipe.plugins import failure
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.proxies.networks import ProxyNet

IMAGES = 3
"""Random images that a network is tried with."""
CLASSES = 10
"""Classes to try with while those of the source are not known."""
NO_MIXING = "use layers that do not mix images, such as BatchNorm with running statistics"
MEAN, STD = 0.5, 0.25
"""Normalisation of each channel to try with while that of the source is not known."""


def check_network(config: Config, run: Run) -> None:
    """Try to build the proxy, load its weights and train it on a few random images.

    Raises
    ------
    ConfigError
        If that fails, or if outputs are unusable.
    """
    if _is_known(config):
        return
    import torch

    from raypipe.vision.sync_batchnorm import check_layers

    model, images, labels = _example(config, run)
    name = config.proxy.model
    with torch.no_grad():
        try:
            together = model(images)
        except Exception as error:  # whatever a network's own code raises
            raise ConfigError(
                f"proxy.model: {name} cannot process images of {config.proxy.image_size} pixels "
                f"({failure(error)}); fix the network"
            ) from None
        try:
            alone = torch.cat([model(image[None]) for image in images])
        except Exception as error:
            raise ConfigError(
                f"proxy.model: {name} cannot process a single image in eval mode "
                f"({failure(error)}); {NO_MIXING}"
            ) from None
    if not together.isfinite().all():
        raise ConfigError(
            f"proxy.model: {name} returns values that are not finite; check its initial weights"
        )
    if not torch.allclose(together, alone, rtol=1e-2, atol=1e-3):
        raise ConfigError(
            f"proxy.model: the outputs of {name} for an image depend on the other images of its "
            f"batch, also in eval mode; {NO_MIXING}"
        )
    if config.proxy.workers > 1:
        check_layers(model, gpu=config.proxy.use_gpu is not False)
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
    except Exception as error:
        raise ConfigError(
            f"proxy.model: {name} cannot be trained ({failure(error)}); fix the network"
        ) from None
    trained = [value for value in model.backbone.parameters() if value.requires_grad]
    if trained and all(value.grad is None for value in trained):
        raise ConfigError(
            f"proxy.model: no weight of {name} but those of its last layer gets a gradient; fix "
            "the network, or set proxy.train to head"
        )
    for full_name, value in model.named_parameters():
        key = full_name.removeprefix("backbone.")
        if value.grad is None and value.requires_grad and config.proxy.workers > 1:
            raise ConfigError(
                f"proxy.model: the output of {name} does not depend on its weight {key}, which "
                "several workers cannot train; remove it, or set proxy.workers to 1"
            )
        if value.grad is not None and not value.grad.isfinite().all():
            raise ConfigError(
                f"proxy.model: the gradient of {key} of {name} is not finite on random images"
            )


def check_forward_mode(config: Config, run: Run) -> None:
    """Raise ConfigError if MoSo needs forward mode, and the network has a layer without it."""
    moso, measure = config.measure.moso, config.measure
    per_sample = moso.self_term is True and not config.proxy.cross_fits
    if _is_known(config) or "moso" not in measure.scores or moso.gradient == "head" or per_sample:
        return
    from raypipe.scores.forward_support import forward_mode_problem

    if problem := forward_mode_problem(*_example(config, run)):
        raise ConfigError(
            f"measure.scores: moso cannot be measured with {config.proxy.model}, because it cannot "
            f"be differentiated forward: {problem}. Set measure.moso.gradient to head, or choose "
            "another score"
        )


def _is_known(config: Config) -> bool:
    return config.proxy.model in PROXY_MODELS and config.proxy.weights == "none"


def _example(config: Config, run: Run) -> tuple[ProxyNet, Tensor, Tensor]:
    """Return the proxy as a training starts with it, in eval mode, random images and labels."""
    import torch

    from raypipe.proxies.networks import new_proxy
    from raypipe.proxies.normalisation import input_statistics
    from raypipe.runs.initial_weights import read_weights

    settings, size, channels = config.proxy, config.proxy.image_size, config.proxy.channels
    statistics = input_statistics(settings, [MEAN] * channels, [STD] * channels)
    try:
        classes = len(run.classes().names) or CLASSES
    except FileNotFoundError:
        classes = CLASSES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = new_proxy(settings, classes, size, statistics, read_weights(settings)).eval()
    random = torch.Generator().manual_seed(settings.seed)
    shape = (IMAGES, channels, size, size)
    images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    return model, images, torch.arange(IMAGES) % classes
