"""Networks from libraries and from modules of the user's own, and what is wrong with some."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import batch
from torchvision import models

from raypipe.config import ProxySettings
from raypipe.config.choices import PROXY_MODELS, is_model, is_own
from raypipe.errors import ConfigError
from raypipe.plugins import code_allowed
from raypipe.proxies import torchvision_networks
from raypipe.proxies.networks import build_network
from raypipe.proxies.normalisation import input_statistics
from raypipe.proxies.registry import find
from raypipe.proxies.sizes import size_of

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, image_size, channels):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, classes), nn.ReLU())
        self.out = nn.Linear(classes, classes, bias=False)
    def forward(self, x):
        return self.out(self.body(x))

def net(classes, image_size, channels):
    return Net(classes, image_size, channels)
net.default_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 8, 8)}

def no_module(classes, image_size, channels):
    return {}

def raises(classes, image_size, channels):
    raise ValueError("no such thing")

def exits(classes, image_size, channels):
    raise SystemExit(3)

def one_argument(classes):
    return nn.Identity()

def wrong_width(classes, image_size, channels):
    return Net(classes + 1, image_size, channels)

class Two(Net):
    def forward(self, x):
        return super().forward(x), x

class NotFinite(Net):
    def forward(self, x):
        return self.out(self.body(x) / 0)

class NoHead(Net):
    def forward(self, x):
        return torch.tanh(super().forward(x))

class Fails(Net):
    def forward(self, x):
        return self.out(x)

def stated(classes, image_size, channels):
    return Net(classes, image_size, channels)
stated.default_cfg = {"mean": (127, 127, 127)}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder, and the permission to import it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets_beside.py").write_text(NETWORKS)
    with code_allowed():
        yield "nets_beside"
    sys.modules.pop("nets_beside", None)


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [
        ("torchvision:resnet18", 32, "fc"),
        ("torchvision:convnext_tiny", 32, "classifier.2"),
        ("torchvision:efficientnet_b0", 32, "classifier.1"),
        ("torchvision:vit_b_16", 32, "heads.head"),
        ("torchvision:swin_v2_t", 32, "head"),
        ("torchvision:densenet121", 32, "classifier"),
        ("torchvision:vgg11", 32, "classifier.6"),
        ("torchvision:googlenet", 64, "fc"),
    ],
)
def test_classifiers_of_torchvision_are_split_before_their_last_layer(
    name: str, size: int, head: str
) -> None:
    with torch.device("meta"):  # nothing is computed
        model = build_network(name, 7, size).eval()
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        embedding = model.embed(images)
    assert model.head_name == head
    assert embedding.shape == (2, model.head.in_features)
    assert model.head(embedding).shape == (2, 7)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_classifiers_of_timm_are_split_before_their_last_layer(name: str) -> None:
    timm, (images, _) = pytest.importorskip("timm"), batch(2, 32)
    torch.manual_seed(0)
    model = build_network(f"timm:{name}", 7, 32).eval()
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=7, **({"img_size": 32} if "vit" in name else {}))
    pixels = (images.float() / 255 - model.mean) / model.std
    torch.testing.assert_close(model(images), whole.eval()(pixels), rtol=1e-5, atol=1e-6)
    published = find(f"timm:{name}")
    assert published.input_size == 160
    assert published.mean == tuple(timm.get_pretrained_cfg(name).mean)


FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5 "
    "mobilenet_v2 shufflenet_v2_x0_5 squeezenet1_0 swin_t vgg11 vit_b_16 resnet18"
)


@pytest.mark.parametrize("name", FAMILIES.split())
def test_classifiers_of_torchvision_take_images_of_any_channels(name: str) -> None:
    size = find(f"torchvision:{name}").input_size
    with torch.device("meta"):
        network = find(f"torchvision:{name}").make(5, size, 2)
        assert network.eval()(torch.zeros(2, 2, size, size)).shape == (2, 5)


def test_squeezenet_has_a_linear_head_with_its_published_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published = models.squeezenet1_1().state_dict()
    monkeypatch.setattr(torchvision_networks, "_download", lambda *_: published)
    model = build_network("torchvision:squeezenet1_1", 5, 32)
    weights = find("torchvision:squeezenet1_1").pretrained
    assert weights is not None
    given = weights(32)
    assert model.head.in_features == 512 and given[f"{model.head_name}.weight"].shape == (1000, 512)
    assert set(given) == set(find("torchvision:squeezenet1_1").make(5, 32, 3).state_dict())


def test_size_of_a_network_is_counted() -> None:
    size = size_of("torchvision:mobilenet_v3_small", 224)
    stated = models.get_model_weights("mobilenet_v3_small").DEFAULT.meta
    assert size.width == 1024
    assert size.parameters == stated["num_params"] - 1000 * (size.width + 1)
    assert size.macs == pytest.approx(1e9 * stated["_ops"], rel=0.05)
    computes_while_built = size_of("torchvision:regnet_y_400mf", 32)
    assert computes_while_built.width == 440


def test_a_network_of_ones_own_is_split_and_states_its_normalisation(module: str) -> None:
    model, (images, _) = build_network(f"{module}:net", 5, 8).eval(), batch(3, 8)
    assert (model.head_name, model.head.in_features) == ("out", 5)
    assert model.head.bias is not None and not model.head.bias.any()
    assert torch.equal(model.head(model.embed(images)), model(images))
    measured = ((0.5,) * 3, (0.2,) * 3)
    own = ProxySettings(model=f"{module}:net", normalize="network")
    assert input_statistics(own, *measured) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    without = ProxySettings(model="small", normalize="network")
    assert input_statistics(without, *measured) == ([0.5] * 3, [0.2] * 3)


def test_normalisation_is_that_of_the_network_if_weights_are_given() -> None:
    given = {"model": "torchvision:vit_b_16", "weights": "pretrained"}
    settings = ProxySettings.model_validate(given)
    assert settings.normalize == "network" and ProxySettings().normalize == "measured"
    assert input_statistics(settings, [0] * 3, [1] * 3)[0] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:convnext_tinny", "has no network 'convnext_tinny'; did you mean convnext_t"),
        ("torchvision:vit_b_16", r"cannot be built for images of 20 pixels .*set proxy.image_size"),
        ("torchvision:inception_v3", r"cannot process images of 20 pixels \(.*made for"),
        ("nets_beside:no_module", "returned a dict; it must return a torch.nn.Module"),
        (
            "nets_beside:raises",
            r"channels=3\) raised ValueError: no such thing, nets_beside.py line",
        ),
        ("nets_beside:exits", r"channels=3\) raised SystemExit: 3, nets_beside.py line"),
        ("nets_beside:one_argument", "raised TypeError"),
        ("nets_beside:wrong_width", r"shape \[2, 6\] for 2 images and 5 classes"),
        ("nets_beside:Two", "returns a tuple, not a tensor"),
        ("nets_beside:NotFinite", "not finite"),
        ("nets_beside:NoHead", "does not end in an nn.Linear"),
        (
            "nets_beside:Fails",
            r"cannot process images of 20 pixels \(RuntimeError.*nets_beside.py line",
        ),
        ("nets_beside:stated", "default_cfg of nets_beside:stated must be a dict"),
    ],
)
def test_what_is_wrong_with_a_network_is_one_line(module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_network(name, 5, 20)
    assert str(caught.value).startswith("proxy.model: ") and "\n" not in str(caught.value)


def test_an_unknown_network_of_timm_is_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"did you mean .*vit_tiny_patch16_224"):
        build_network("timm:vit_tiny_patch16_225", 5, 32)


def test_timm_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from raypipe.proxies import timm_networks

    monkeypatch.setitem(sys.modules, "timm", None)
    timm_networks.names.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'raypipe\[timm\]'"):
        find("timm:test_vit")


def test_the_form_of_a_name_says_where_the_network_comes_from() -> None:
    assert all(is_model(name) and not is_own(name) for name in PROXY_MODELS)
    assert is_model("torchvision:vit_b_16") and not is_own("torchvision:vit_b_16")
    assert is_model("pack.age:function") and is_own("pack.age:function")
    assert not any(map(is_model, ["vgg", "torchvision:", "a:b:c", "a/b.py:c", "timm:"]))
