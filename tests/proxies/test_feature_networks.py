"""Networks of `embed.model`: libraries, files, code of the user's own, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_config
from safetensors.torch import save_file
from torch import nn

from raypipe.config import Config
from raypipe.errors import ConfigError
from raypipe.plugins import code_allowed
from raypipe.proxies.feature_networks import FeatureNetwork, build_features, find_features
from raypipe.runs.features import image_size_of_features, load_features
from raypipe.vision.devices import AdaptiveBatch
from raypipe.vision.forward import embed

SMALL = "torchvision:shufflenet_v2_x0_5"


def brightness(image_size: int, channels: int) -> nn.Module:
    """Four brightness values of each channel."""
    return nn.Sequential(nn.AvgPool2d(image_size // 2), nn.Flatten())


brightness.default_cfg = {  # type: ignore[attr-defined]
    "input_size": (3, 16, 16),
    "mean": (0.25, 0.5, 0.75),
    "std": (0.5, 0.5, 0.5),
}


def no_module(image_size: int, channels: int) -> Any:
    return None


def pixels(image_size: int, channels: int) -> nn.Module:
    return nn.Identity()


def fails(image_size: int, channels: int) -> nn.Module:
    raise ValueError("no")


def not_finite(image_size: int, channels: int) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, 2))
    nn.init.constant_(network[1].weight, float("nan"))
    return network


def _config(name: str, *overrides: str) -> Config:
    return small_config("run", f"embed.model={name}", *overrides)


def test_a_function_of_ones_own_states_size_and_normalisation() -> None:
    config = _config(f"{__name__}:brightness")
    with code_allowed():
        assert image_size_of_features(config) == 16
        network = load_features(config)
    images = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    expected = torch.tensor([1.5, 1.0, 0.5]).repeat_interleave(4)
    torch.testing.assert_close(network(images)[0], expected)


def test_an_embedding_does_not_depend_on_the_batch() -> None:
    network = load_features(_config(SMALL, "embed.weights=none", "embed.image_size=32"))
    images = np.random.default_rng(0).integers(0, 256, (37, 3, 32, 32), dtype=np.uint8)
    together = embed(network, images, AdaptiveBatch(64), "cpu", False)
    assert together.shape == (37, 1024) and together.dtype == np.float32
    alone = embed(network, images[-1:], AdaptiveBatch(64), "cpu", False)
    np.testing.assert_array_equal(together[-1:], alone)


def test_weights_come_from_a_file_of_the_classifier(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(3)
    classifier = torchvision.models.shufflenet_v2_x0_5(num_classes=7).eval()
    save_file(classifier.state_dict(), tmp_path / "w.safetensors")
    network = load_features(
        _config(SMALL, f"embed.weights={tmp_path}/w.safetensors", "embed.image_size=32")
    )
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = network(images)
    classifier.fc = nn.Identity()
    torch.testing.assert_close(
        features, classifier((images / 255 - network.mean) / network.std).detach()
    )
    with pytest.raises(ConfigError, match=r"^embed.weights: the file does not have the weights of"):
        load_features(
            _config("torchvision:mobilenet_v2", f"embed.weights={tmp_path}/w.safetensors")
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brightnes", "has no 'brightnes'; did you mean 'brightness'"),
        ("no_module", r"returned a NoneType; it must return a torch.nn.Module"),
        ("pixels", r"returns torch.float32 of shape \[2, 3, 8, 8\] for 2 images; expected floats"),
        ("fails", r"\(image_size=8, channels=3\) raised ValueError: no, test_feature_networks.py"),
        ("not_finite", "returns values that are not finite"),
    ],
)
def test_what_is_wrong_with_a_function_is_one_line(name: str, message: str) -> None:
    with code_allowed(), pytest.raises(ConfigError, match=rf"^embed.model: .*{message}") as caught:
        load_features(_config(f"{__name__}:{name}"))
    assert "\n" not in str(caught.value)


def test_code_is_not_imported_where_that_is_not_allowed() -> None:
    with pytest.raises(ConfigError, match=r"embed.model: .* is code from outside raypipe"):
        image_size_of_features(_config(f"{__name__}:brightness"))


def test_an_unknown_network_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^embed.model: torchvision has no .*shufflenet_v2_x0_5"):
        find_features("torchvision:shufflenet_v2_x0_55")


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32", "transformers:facebook/dinov2-small"])
def test_a_library_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    library = name.partition(":")[0]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"pip install 'raypipe\[{library}\]'"):
        find_features(name)


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", refuse)
    with pytest.raises(ConfigError, match=r"^embed.weights: .*no network.*; put https://.* at /"):
        load_features(_config(SMALL))


@pytest.mark.parametrize("kind", ["dinov2", "siglip_vision_model"])
def test_a_folder_in_the_layout_of_transformers_is_read(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.AutoConfig.for_model(kind, **sizes, patch_size=14, intermediate_size=64)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    stated = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.1] * 3}
    stated["image_std"] = [0.2] * 3
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    network = load_features(_config(f"transformers:{tmp_path}"))
    assert isinstance(network, FeatureNetwork)
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(pixel_values=(images / 255 - 0.1) / 0.2).pooler_output
    torch.testing.assert_close(network(images), expected)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded .*put the config.json, model.safet"):
        load_features(_config(f"transformers:{tmp_path}"))


def test_the_image_encoder_of_open_clip_is_read_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip")
    features = find_features("open_clip:RN50/openai")
    assert features.input_size == 224 and features.mean == open_clip.OPENAI_DATASET_MEAN
    network = build_features(features, 32, 3, "none")
    assert network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 1024)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", refuse)
    with pytest.raises(
        ConfigError, match=r"cannot be downloaded \(OSError: no network\); put those"
    ):
        build_features(features, 224, 3, "pretrained")
