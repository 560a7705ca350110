"""Networks of `embed.model`: libraries, files, code of the user's own, and what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_config
from safetensors.torch import save_file
from torch import Tensor, nn

from raypipe.config import Config
from raypipe.errors import ConfigError
from raypipe.plugins import code_allowed
from raypipe.proxies.feature_networks import FeatureNetwork, build_features, find_features
from raypipe.runs.features import (
    bound_features,
    identity_of_features,
    image_size_of_features,
    load_features,
)
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
        bound = bound_features(config)
    assert image_size_of_features(bound) == 16  # without another import
    assert bound_features(_config("proxy")).embed.image_size == "auto"
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
    with (
        pytest.raises(
            ConfigError,
            match=r"^embed.weights: the file does not have the weights of .*: 1 missing \(1.weight\) "
            r"and 1 of another shape \(1.bias\) and 1 unexpected \(2.bias\)",
        ),
        code_allowed(),
    ):
        save_file({"1.bias": torch.ones(3), "2.bias": torch.ones(2)}, tmp_path / "o.safetensors")
        load_features(_config(f"{__name__}:not_finite", f"embed.weights={tmp_path}/o.safetensors"))
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


class ChangesLater(nn.Module):
    """Returns what a test chooses after the trial with random images."""

    later: Any = staticmethod(lambda output: output)

    def forward(self, images: Tensor) -> Tensor:
        return type(self).later(images.flatten(1)[:, :4])


def changes_later(image_size: int, channels: int) -> nn.Module:
    return ChangesLater()


def _raise(output: Tensor) -> Tensor:
    raise RuntimeError("no more")


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (lambda output: output[1:], r"float32 of shape \[31, 4\] for 32 images; .* \[32, 4\]"),
        (lambda output: output[:, 1:], r"float32 of shape \[32, 3\] for 32 images; .* \[32, 4\]"),
        (lambda output: output.long(), r"returns torch.int64 of shape"),
        (lambda output: (output, output), r"returns a tuple; expected a tensor"),
        (_raise, r"\(RuntimeError: no more, test_feature_networks.py line"),
    ],
)
def test_a_network_that_changes_its_output_later_is_named(
    monkeypatch: pytest.MonkeyPatch, later: Any, message: str
) -> None:
    name = f"{__name__}:changes_later"
    with code_allowed():
        network = load_features(_config(name))
    images = np.zeros((37, 3, 8, 8), np.uint8)
    assert embed(network, images, AdaptiveBatch(64), "cpu", False).shape == (37, 4)
    monkeypatch.setattr(ChangesLater, "later", staticmethod(later))
    with pytest.raises(ConfigError, match=rf"^embed.model: {name} .*{message}") as caught:
        embed(network, images, AdaptiveBatch(64), "cpu", False)
    assert "\n" not in str(caught.value)


def test_code_is_not_imported_where_that_is_not_allowed() -> None:
    with pytest.raises(ConfigError, match=r"embed.model: .* is code from outside raypipe"):
        image_size_of_features(_config(f"{__name__}:brightness"))


def test_an_unknown_network_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^embed.model: torchvision has no .*shufflenet_v2_x0_5"):
        find_features("torchvision:shufflenet_v2_x0_55")


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32", "transformers:facebook/dinov2-small"])
def test_a_library_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = name.partition(":")[0]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"pip install 'raypipe\[{library}\]'"):
        find_features(name)


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from raypipe.proxies import torchvision_networks

    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/none")
    monkeypatch.setattr(torchvision_networks, "unreachable", lambda url: "no network")
    expected = r"^embed.weights: .*no network.*, put https://.* at /none/checkpoints/.* on each"
    with pytest.raises(ConfigError, match=expected):
        load_features(_config(SMALL))


@pytest.mark.parametrize("kind", ["dinov2", "siglip_vision_model"])
def test_a_folder_in_the_layout_of_transformers_is_read(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
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
    weights, file = model.state_dict(), tmp_path / "model.safetensors"
    first = next(name for name in weights if name.endswith("q_proj.weight") or "query" in name)
    save_file({name: value for name, value in weights.items() if name != first}, file)
    with pytest.raises(ConfigError, match=rf"those of another network: 1 missing \({first}\)"):
        load_features(_config(f"transformers:{tmp_path}"))
    other = {name: value for name, value in weights.items() if name != first}
    norm = next(name for name in other if "norm" in name)
    save_file({**other, "mine": torch.ones(1), norm: torch.ones(7)}, file)
    capsys.readouterr()
    with pytest.raises(
        ConfigError,
        match=rf"1 missing \({first}\) and 1 of another shape \({norm}\) and 1 unexpected \(mine\)",
    ):
        load_features(_config(f"transformers:{tmp_path}"))
    assert capsys.readouterr() == ("", "")  # no progress bars
    file.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"cannot be loaded \(SafetensorError.*put the config"):
        load_features(_config(f"transformers:{tmp_path}"))
    file.unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded .*put the config.json, model.safet"):
        load_features(_config(f"transformers:{tmp_path}"))


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"^embed.model: transformers:/.*/none: no such folder$"):
        load_features(_config(f"transformers:{tmp_path}/none"))


def test_a_pooling_layer_without_weights_is_not_used(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.AutoConfig.for_model("vit", **sizes, patch_size=14, intermediate_size=64)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 28}))
    network = load_features(_config(f"transformers:{tmp_path}"))
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        output = network.body.model(pixel_values=(images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(network(images), output.last_hidden_state.mean(1))


def test_a_folder_is_identified_by_its_content(tmp_path: Path) -> None:
    config, file = _config(f"transformers:{tmp_path}"), tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    file.write_bytes(b"1")
    before = identity_of_features(config)
    (tmp_path / "README.md").write_text("not read")
    assert identity_of_features(config) == before
    file.write_bytes(b"2")
    other = identity_of_features(config)
    file.write_bytes(b"1")
    (tmp_path / "config.json").write_text("[]")
    assert before not in (other, identity_of_features(config))


def test_published_weights_of_open_clip_are_identified_by_their_tag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OpenClip:
        tags = ("openai", "laion400m")

        def list_pretrained_tags_by_model(self, name: str) -> tuple[str, ...]:
            return self.tags

    library, config = OpenClip(), _config("open_clip:ViT-B-32")
    monkeypatch.setitem(sys.modules, "open_clip", library)
    before = identity_of_features(config)
    assert before == identity_of_features(_config("open_clip:ViT-B-32/openai"))
    library.tags = ("laion2b", "openai")  # a newer version of the package
    assert identity_of_features(config) != before


def test_the_image_encoder_of_open_clip_is_read_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip")
    features = find_features("open_clip:RN50/openai")
    assert features.input_size == 224 and features.mean == open_clip.OPENAI_DATASET_MEAN
    network = build_features(features, 32, 3, "none")
    assert network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 1024)
    with pytest.raises(ConfigError, match="takes images with 3 channels, not 4"):
        build_features(features, 32, 4, "none")

    activations = []

    def refuse(*arguments: Any, **options: Any) -> None:
        activations.append(options["force_quick_gelu"])
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", refuse)
    monkeypatch.setattr("raypipe.proxies.downloads.unreachable", lambda url: "no network")
    with pytest.raises(
        ConfigError,
        match=r"cannot be loaded \(OSError: no network\); without a network, copy "
        r"open_clip_model.safetensors of https://huggingface.co/timm/resnet50_clip.openai to where "
        r"each node reads it, set embed.weights to its path and embed.model to open_clip:RN50/open",
    ):
        build_features(features, 224, 3, "pretrained")
    with pytest.raises(ConfigError, match=r"^embed.model: .* cannot be built for images of 224"):
        build_features(features, 224, 3, "none")
    # the activation is that of the tag; without one, a file can be that of another tag
    for name, weights in (("ViT-B-32/laion2b_e16", "pretrained"), ("ViT-B-32", "none")):
        with pytest.raises(ConfigError):
            build_features(find_features(f"open_clip:{name}"), 224, 3, weights)
    assert activations == [True, True, False, False]
