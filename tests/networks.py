"""Networks and images shared by the tests of scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig

from raypipe.proxies.network import Network
from raypipe.proxies.networks import ProxyNet, proxy_of


def as_trained(model: nn.Module) -> nn.Module:
    """The network in eval mode, its BatchNorm with statistics as after a training, not the 0 and 1 of a fresh one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def batch(count: int, size: int, classes: int = 5, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Random images uint8 [count, 3, size, size] and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, classes, (count,), generator=generator)


class Gate(nn.Module):
    """A layer that no library has: its weights are used twice, and once without a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.scale = nn.Linear(width, width), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.mix(x)) * self.scale
        return gate * F.linear(x, self.mix.weight.T)


class Own(nn.Module):
    """A network with attention over the pixels, a layer of its own, and dropout."""

    def __init__(self, classes: int, branches: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.gate, self.drop, self.norm = Gate(8), nn.Dropout(0.2), nn.LayerNorm(8)
        self.out = nn.Linear(8, classes, bias=False)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and float(x.detach().mean()) > 1e9:  # torch.fx cannot trace this
            x = -x
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.norm(self.drop(self.gate(x))).mean(1))


class TokensFirst(nn.Module):
    """Attention with the tokens, as many as there are images in a test, on the first axis."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, 8)
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x).flatten(2).permute(2, 0, 1))
        x = x + self.attention(x, x, x)[0]
        return self.out(x.mean(0))


def _convnext(classes: int) -> nn.Module:
    blocks = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)]
    return models.ConvNeXt(blocks, stochastic_depth_prob=0.3, num_classes=classes)


def _efficientnet(classes: int) -> nn.Module:
    blocks = [MBConvConfig(1, 3, 1, 32, 16, 1, 0.25, 1), MBConvConfig(4, 5, 2, 16, 24, 2, 0.25, 1)]
    return models.EfficientNet(blocks, dropout=0.2, num_classes=classes, last_channel=32)


def _vit(classes: int) -> nn.Module:
    return models.VisionTransformer(16, 8, 2, 2, 16, 32, dropout=0.1, num_classes=classes)


def _swin(classes: int, version: int = 1) -> nn.Module:
    layers = models.swin_transformer
    block = layers.SwinTransformerBlockV2 if version == 2 else layers.SwinTransformerBlock
    merging = layers.PatchMergingV2 if version == 2 else layers.PatchMerging
    return models.SwinTransformer(
        *([2, 2], 8, [2, 1], [2, 2], [2, 2]),
        num_classes=classes,
        block=block,
        downsample_layer=merging,
    )


def _densenet(classes: int) -> nn.Module:
    return models.DenseNet(4, (2, 2), 8, num_classes=classes)


def _shufflenet(classes: int) -> nn.Module:
    return models.ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 32], num_classes=classes)


TINY: dict[str, Callable[[int], nn.Module]] = {
    "resnet": lambda classes: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], classes),
    "convnext": _convnext,
    "efficientnet": _efficientnet,
    "vit": _vit,
    "swin": _swin,
    "swin v2": partial(_swin, version=2),
    "densenet": _densenet,
    "shufflenet": _shufflenet,
    "own": Own,
    "own, not traceable": partial(Own, branches=True),
    "tokens first": TokensFirst,
}
"""Small networks of the kinds that a proxy can be: classes -> classifier of 16 x 16 pixels."""


def tiny(name: str, classes: int = 5) -> ProxyNet:
    """One of `TINY` as a proxy in float64, with weights as after a training."""
    torch.manual_seed(3)
    network = Network(name, lambda classes, size, channels: TINY[name](classes))
    model = proxy_of(network, classes, 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    as_trained(model)
    return model
