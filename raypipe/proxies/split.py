"""Split a classifier into a backbone and its last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raypipe.errors import ConfigError
from raypipe.plugins import failure
from raypipe.proxies.network import CHANNELS, Network

PROBES = 2
"""Images that are passed through a network to find its last layer."""


def split_head(
    network: Network,
    module: nn.Module,
    classes: int,
    image_size: int,
    channels: int = CHANNELS,
) -> tuple[nn.Module, nn.Linear, str]:
    """Return the classifier without its last layer, that layer, and its name.

    Parameters
    ----------
    network : Network
        Where the classifier comes from.
    module : nn.Module
        The classifier. Its last layer is replaced by an identity.
    classes, image_size, channels : int
        Number of classes; side of the images in pixels; their channels.

    Returns
    -------
    backbone : nn.Module
        Maps float [n, channels, size, size] to embeddings [n, width].
    head : nn.Linear
        Maps embeddings to logits [n, classes]. A layer without bias gets one of zeros.
    name : str
        Name of the head in the classifier.

    Raises
    ------
    ConfigError
        If the classifier cannot process such images, or does not end in an `nn.Linear`.
    """
    name = network.head or _name_of_head(network, module, classes, image_size, channels)
    head = module.get_submodule(name)
    assert isinstance(head, nn.Linear)
    module.set_submodule(name, nn.Identity())
    return module, head if head.bias is not None else _with_bias(head), name


def probe_images(module: nn.Module, image_size: int, channels: int = CHANNELS) -> Tensor:
    """Return normalised images to try a network with, float [PROBES, channels, size, size]."""
    shape = (PROBES, channels, image_size, image_size)
    like = next(iter(module.parameters()), torch.zeros(()))
    values = torch.linspace(-1, 1, PROBES * channels * image_size**2, device=like.device)
    return values.to(like.dtype).view(shape)


def _name_of_head(
    network: Network, module: nn.Module, classes: int, image_size: int, channels: int
) -> str:
    """Return the name of the `nn.Linear` whose output is the output of the network."""
    calls: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: calls.append((name, output)))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = module(probe_images(module, image_size, channels))
    except Exception as error:  # whatever a network's own code raises
        raise ConfigError(
            f"proxy.model: {network.name} cannot process images of {image_size} pixels "
            f"({failure(error)}){_size_hint(network, image_size)}"
        ) from None
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    _check_output(network, output, classes)
    for name, result in reversed(calls):
        same = result is output or (
            result.shape == output.shape and not result.is_meta and torch.equal(result, output)
        )
        if same and name:
            return name
    raise ConfigError(
        f"proxy.model: {network.name} does not end in an nn.Linear, whose input is the embedding; "
        "end it with nn.Linear(width, classes)"
    )


def _check_output(network: Network, output: object, classes: int) -> None:
    """Raise ConfigError unless the output of a network is a batch of finite logits."""
    if not isinstance(output, Tensor):
        raise ConfigError(
            f"proxy.model: {network.name} returns a {type(output).__name__}, not a tensor of "
            "logits [images, classes]"
        )
    if tuple(output.shape) != (PROBES, classes) or not output.is_floating_point():
        raise ConfigError(
            f"proxy.model: {network.name} returns {output.dtype} of shape {list(output.shape)} "
            f"for {PROBES} images and {classes} classes; it must return floats of shape "
            f"[{PROBES}, {classes}]"
        )
    if not output.is_meta and not output.isfinite().all():
        raise ConfigError(
            f"proxy.model: {network.name} returns values that are not finite for images between "
            "-1 and 1; check its initial weights"
        )


def _size_hint(network: Network, image_size: int) -> str:
    if network.input_size is None or network.input_size == image_size:
        return ""
    return f"; it is made for {network.input_size}: set proxy.image_size"


def _with_bias(head: nn.Linear) -> nn.Linear:
    result = nn.utils.skip_init(
        nn.Linear, head.in_features, head.out_features, device=head.weight.device
    ).to(head.weight.dtype)
    with torch.no_grad():
        result.weight.copy_(head.weight)
        result.bias.zero_()
    return result
