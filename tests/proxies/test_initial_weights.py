"""Weights that a training starts from, and those that it leaves as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import batch
from safetensors.torch import save_file
from torch import nn

from raypipe.config import ProxySettings
from raypipe.errors import ConfigError
from raypipe.proxies.networks import NORMALISATION, ProxyNet, new_proxy
from raypipe.proxies.resnets import resnet
from raypipe.runs.initial_weights import identity_of_weights, read_weights
from raypipe.scores.calibration import recalibrate
from raypipe.vision.training import make_optimizer

STATISTICS = ((0.5,) * 3, (0.25,) * 3)


def _classifier(classes: int, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return resnet("small").make(classes, 16, 3)


def _proxy(weights: Path | str, classes: int = 4, **settings: str) -> ProxyNet:
    given = ProxySettings.model_validate(
        {"model": "small", "image_size": 16, "weights": str(weights), **settings}
    )
    return new_proxy(given, classes, 16, STATISTICS, read_weights(given))


@pytest.mark.parametrize("classes", [4, 9])
def test_weights_are_loaded_and_a_last_layer_for_other_classes_is_not(
    tmp_path: Path, classes: int
) -> None:
    network, file = _classifier(classes), tmp_path / "weights.safetensors"
    save_file(network.state_dict(), file)
    torch.manual_seed(1)
    model = _proxy(file)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name
    assert torch.equal(model.head.weight, network.head.weight) == (classes == 4)


def test_a_checkpoint_of_a_run_serves_as_weights(tmp_path: Path) -> None:
    earlier = _proxy("none")
    save_file(earlier.state_dict(), tmp_path / "epoch-0003.safetensors")
    later = _proxy(tmp_path / "epoch-0003.safetensors")
    images, _ = batch(2, 16)
    assert torch.equal(earlier.eval()(images), later.eval()(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.weight"), r"1 missing \(0.weight\); set proxy.model"),
        (
            lambda state: state.update({f"extra.{i}": torch.zeros(1) for i in range(5)}),
            r"5 unexpected \(extra.0, extra.1, extra.2, ...\)",
        ),
        (
            lambda state: state.update({"0.weight": torch.zeros(24, 3, 7, 7)}),
            r"0.weight has the shape \[24, 3, 7, 7\] in .*but \[24, 3, 3, 3\] in small",
        ),
        (lambda state: state["0.weight"].fill_(torch.nan), "0.weight is not finite"),
    ],
)
def test_weights_of_another_network_are_refused(
    tmp_path: Path, change: object, message: str
) -> None:
    state = dict(_classifier(4).state_dict())
    change(state)  # type: ignore[operator]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=message) as caught:
        _proxy(tmp_path / "weights.safetensors")
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights: \S+none.safetensors: no such file"):
        _proxy(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        _proxy(tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match="small has no published weights"):
        _proxy("pretrained")


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/none")
    monkeypatch.setattr(
        "raypipe.proxies.torchvision_networks.unreachable", lambda url: "no route to host"
    )
    given = {"model": "torchvision:mobilenet_v3_small", "weights": "pretrained"}
    with pytest.raises(
        ConfigError,
        match=r"no route to host\).*, put https://\S+ at \S+mobilenet_v3_small\S+ on ",
    ):
        read_weights(ProxySettings.model_validate(given))


def _changed(model: ProxyNet) -> tuple[set[str], set[str]]:
    """Weights, and statistics of BatchNorm, that a step of training changes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings, (images, labels) = ProxySettings(), batch(8, 16, classes=4)
    optimizer = make_optimizer(settings, model)
    F.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()
    weights = {name for name, _ in model.named_parameters()}
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    return changed & weights, changed - weights


NORMS = {name for name, layer in _proxy("none").named_modules() if isinstance(layer, NORMALISATION)}


def test_everything_is_trained_by_default() -> None:
    model = _proxy("none")
    weights, statistics = _changed(model)
    assert weights == {name for name, _ in model.named_parameters()}
    assert {name.rpartition(".")[0] for name in statistics} == NORMS


@pytest.mark.parametrize("train", ["full", "head"])
def test_a_frozen_backbone_stays_as_it_is(train: str) -> None:
    assert _changed(_proxy("none", freeze="backbone", train=train)) == (
        {"head.weight", "head.bias"},
        set(),
    )


def test_training_the_head_leaves_weights_but_statistics_follow() -> None:
    weights, statistics = _changed(_proxy("none", train="head"))
    assert weights == {"head.weight", "head.bias"}
    assert {name.rpartition(".")[0] for name in statistics} == NORMS


def test_frozen_normalisation_keeps_weights_and_statistics() -> None:
    model = _proxy("none", freeze="norm")
    weights, statistics = _changed(model)
    assert not statistics and {name.rpartition(".")[0] for name in weights}.isdisjoint(NORMS)
    assert len(weights) == sum(value.requires_grad for value in model.parameters())
    before = {name: value.clone() for name, value in model.named_buffers()}
    recalibrate(model, [batch(8, 16)[0]])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_weights_are_identified_by_their_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first.write_bytes(b"1")
    second.write_bytes(b"1")
    before = identity_of_weights(str(first), "proxy")
    assert before == identity_of_weights(str(second), "proxy")
    second.write_bytes(b"2")
    assert identity_of_weights(str(second), "proxy") != before
    assert identity_of_weights("pretrained", "proxy") == "pretrained"
    first.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        identity_of_weights(str(first), "proxy")
