"""Features of a torchvision network with existing weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from raypipe.config import PseudoLabelSettings
from raypipe.errors import ConfigError
from raypipe.pseudo_labels.backbone import Backbone
from raypipe.pseudo_labels.labeller import features
from raypipe.stages.pseudo_label import _backbone
from raypipe.vision.devices import AdaptiveBatch


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    torch.manual_seed(3)
    return torchvision.models.resnet18(num_classes=7).eval()


def settings(weights: str, model: str = "resnet18") -> PseudoLabelSettings:
    return PseudoLabelSettings(
        clusters=3, features="backbone", model=model, weights=weights, image_size=48
    )


def test_features_are_what_the_network_gives_its_last_layer(donor: nn.Module, tmp_path) -> None:
    save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    backbone = _backbone(settings(str(tmp_path / "weights.safetensors")), "cpu")
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 24, 24), np.uint8)
    scaled = nn.functional.interpolate(
        torch.from_numpy(images) / 255, (48, 48), mode="bilinear", antialias=True
    )
    normalised = torchvision.transforms.functional.normalize(
        scaled, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    with torch.no_grad():
        expected = donor(normalised)
        last = (
            torch.from_numpy(features(backbone, images, AdaptiveBatch(2))) @ donor.fc.weight.T
            + donor.fc.bias
        )
    assert torch.allclose(last, expected, atol=1e-4)


def test_weights_of_another_network_are_refused(donor: nn.Module, tmp_path) -> None:
    with torch.random.fork_rng(devices=[]):
        other = Backbone("resnet34", 48)
    with pytest.raises(
        ConfigError,
        match=r"does not have the weights of torchvision's resnet34 "
        r"\(\d+ missing, such as layer1\.2",
    ):
        other.load_weights(donor.state_dict(), "given")
    wide = {**donor.state_dict(), "conv1.weight": torch.zeros(64, 3, 3, 3)}
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(ConfigError, match=r"1 that do not fit, such as conv1\.weight"),
    ):
        Backbone("resnet18", 48).load_weights(wide, "given")


def test_weights_that_cannot_be_had_end_it_with_what_helps(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"pseudo_labels\.weights: .*nowhere: no such file"):
        _backbone(settings(str(tmp_path / "nowhere")), "cpu")
    (tmp_path / "words").write_bytes(b"not weights at all")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        _backbone(settings(str(tmp_path / "words")), "cpu")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", _offline)
    with pytest.raises(
        ConfigError,
        match=r"not in torchvision's cache and cannot be downloaded.*no network.*safetensors file",
    ):
        _backbone(settings("torchvision://"), "cpu")


def _offline(*_: object, **__: object) -> None:
    raise OSError("no network")
