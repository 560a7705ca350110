"""Self-supervised training: views, the loss, and a training that was interrupted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import digit_images
from torch import Tensor

from raypipe.config import PseudoLabelSettings
from raypipe.errors import RaypipeError
from raypipe.proxies.networks import ProxyNet
from raypipe.pseudo_labels.labeller import features
from raypipe.pseudo_labels.simclr import contrastive_loss, pretext_network, pretrain, random_views
from raypipe.vision.devices import AdaptiveBatch

MEAN, STD = [0.3] * 3, [0.4] * 3


def digits(count: int) -> np.ndarray:
    return np.repeat(digit_images(count)[0][:, None], 3, 1)


def colours(count: int, size: int = 12) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)
    )


def test_a_view_is_an_image_of_the_same_size_and_differs_from_the_next() -> None:
    pixels, random = colours(50), np.random.default_rng(1)
    one, other = random_views(pixels, True, random), random_views(pixels, True, random)
    assert one.shape == pixels.shape and one.dtype == torch.float32
    assert one.min() >= 0 and one.max() <= 255
    assert (one - other).abs().flatten(1).mean(1).min() > 5, "two views of an image always differ"
    assert torch.equal(one, random_views(pixels, True, np.random.default_rng(1))), (
        "the same draws give the same views"
    )
    grey = (one - one.mean(1, keepdim=True)).abs().flatten(1).amax(1) < 0.01
    assert 0.05 < grey.float().mean() < 0.45


def test_a_view_is_a_part_of_the_image_mirrored_only_where_it_may_be() -> None:
    # brighter to the right
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(200, 3, 24, 24)
    rises = [
        (
            torch.diff(random_views(ramp, flip, np.random.default_rng(0)).mean((1, 2)), dim=1).mean(
                1
            )
            > 0
        )
        .float()
        .mean()
        for flip in (False, True)
    ]
    assert rises[0] == 1 and 0.3 < rises[1] < 0.7
    profile = random_views(ramp, False, np.random.default_rng(0)).mean((1, 2))
    assert ((profile[:, -1] - profile[:, 0]) / 230).quantile(0.9) < 1.3, (
        "views are crops of the image"
    )


def test_the_loss_is_that_of_the_paper() -> None:
    projected, temperature = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), 0.3
    unit = (projected / projected.norm(dim=1, keepdim=True)).double()
    terms = []
    for i in range(8):
        alike = [float(torch.exp(unit[i] @ unit[k] / temperature)) for k in range(8)]
        terms.append(-np.log(alike[(i + 4) % 8] / sum(alike[k] for k in range(8) if k != i)))
    assert float(contrastive_loss(projected, temperature)) == pytest.approx(
        np.mean(terms), rel=1e-5
    )


def trained(
    epochs: int,
    state: dict[str, Tensor] | None = None,
    kept: list | None = None,
    stop: int | None = None,
    often: bool = False,
) -> ProxyNet:
    network, done = pretext_network("small", 8, MEAN, STD, 0), []

    def save(state: dict[str, Tensor]) -> None:
        if kept is not None:
            kept.append({name: value.clone() for name, value in state.items()})
        if len(kept or ()) == stop:
            raise KeyboardInterrupt

    settings = PseudoLabelSettings(clusters=10, epochs=epochs, batch_size=32)
    pretrain(
        network,
        digits(96),
        settings,
        flip=False,
        state=state,
        save=save,
        is_due=lambda: often,
        step=lambda now, total: done.append((now, total)),
    )
    assert done == [(epoch + 1, epochs) for epoch in range(epochs)], (
        "also called for epochs trained before"
    )
    return network


@pytest.mark.parametrize(("often", "batches"), [(False, 3), (True, 4)], ids=["epoch", "batch"])
def test_a_training_goes_on_where_it_was_interrupted(often: bool, batches: int) -> None:
    kept: list[dict[str, Tensor]] = []
    with pytest.raises(KeyboardInterrupt):
        trained(3, kept=kept, stop=4 if often else 1, often=often)
    assert int(kept[-1]["batches"]) == batches, "of three an epoch"
    whole, resumed = trained(3), trained(3, state=kept[-1])
    for (name, value), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_views_of_an_image_come_closer_than_other_images() -> None:
    settings, images = PseudoLabelSettings(clusters=10, epochs=8, batch_size=64), digits(256)

    def ratio(network: ProxyNet) -> float:
        """Return the distance of two views of an image relative to that of two images."""
        random = np.random.default_rng(5)
        one, other = (
            features(
                network.eval(),
                random_views(torch.from_numpy(images), False, random),
                AdaptiveBatch(64),
            )
            for _ in range(2)
        )
        one, other = (
            part / np.linalg.norm(part, axis=1, keepdims=True)
            for part in (one - one.mean(0), other - other.mean(0))
        )
        return float(
            np.linalg.norm(one - other, axis=1).mean()
            / np.linalg.norm(one - np.roll(other, 1, 0), axis=1).mean()
        )

    network = pretext_network("small", 8, MEAN, STD, 0)
    before = ratio(network)
    pretrain(network, images, settings, flip=False)
    assert ratio(network) < before - 0.1


def test_a_loss_that_is_not_finite_ends_it() -> None:
    network, settings = (
        pretext_network("small", 8, MEAN, STD, 0),
        PseudoLabelSettings(clusters=10, epochs=2, lr=3.0),
    )
    with torch.no_grad():
        next(iter(network.backbone.parameters())).fill_(float("nan"))
    with pytest.raises(RaypipeError, match=r"epoch 1; lower pseudo_labels\.lr \(now 3\)"):
        pretrain(network, digits(32), settings, flip=False)
