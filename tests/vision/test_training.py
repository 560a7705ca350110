"""Order, augmentation, learning rate and state of the proxy's training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raypipe.config import ProxySettings
from raypipe.proxies.networks import build_network
from raypipe.vision.training import (
    augment,
    epoch_batches,
    learning_rate,
    make_optimizer,
    restore_training,
    training_state,
)


def test_every_sample_is_in_one_batch_of_an_epoch() -> None:
    batches = epoch_batches(103, 20, seed=1, epoch=4)
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    assert {len(batch) for batch in batches} <= {17, 18}
    assert all(
        np.array_equal(a, b) for a, b in zip(batches, epoch_batches(103, 20, 1, 4), strict=True)
    )
    assert not np.array_equal(np.concatenate(batches), np.concatenate(epoch_batches(103, 20, 1, 5)))


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_learning_rate(schedule: str) -> None:
    settings = ProxySettings(schedule=schedule, lr=0.4)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(0.4, rel=0.06)
    assert min(rates) > 0
    if schedule == "constant":
        assert set(rates) == {0.4}
    else:
        assert rates[-1] == pytest.approx(0.4e-3)
        peak = int(np.argmax(rates))
        assert rates[peak:] == sorted(rates[peak:], reverse=True) and rates[: peak + 1] == sorted(
            rates[: peak + 1]
        )
    assert learning_rate(settings, 0, 1) > 0


def test_checkpoints() -> None:
    assert ProxySettings(epochs=30, checkpoints=10).checkpoint_epochs() == list(range(2, 30, 3))
    assert ProxySettings(epochs=7, checkpoints=3).checkpoint_epochs() == [2, 4, 6]
    assert ProxySettings(epochs=5, checkpoints=5).checkpoint_epochs() == [0, 1, 2, 3, 4]
    assert ProxySettings(epochs=9, checkpoint_choice=(7, 2)).checkpoint_epochs() == [2, 7]
    drawn = ProxySettings(epochs=50, checkpoint_choice="random", seed=3).checkpoint_epochs()
    assert (
        len(drawn) == len(set(drawn)) == 10
        and drawn == sorted(drawn)
        and drawn[0] >= 0
        and drawn[-1] < 50
    )
    assert drawn == ProxySettings(epochs=50, checkpoint_choice="random", seed=3).checkpoint_epochs()
    assert drawn != ProxySettings(epochs=50, checkpoint_choice="random", seed=4).checkpoint_epochs()


def test_augmentation_is_the_same_however_a_batch_is_shared() -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 8), dtype=np.uint8)
    settings = ProxySettings(crop_padding=2)
    whole = augment(images, settings, 3, 1, slice(0, None, 1))
    for rank in range(3):
        np.testing.assert_array_equal(
            augment(images, settings, 3, 1, slice(rank, None, 3)), whole[rank::3]
        )
    assert not np.array_equal(whole, augment(images, settings, 3, 2, slice(None)))
    plain = ProxySettings(crop_padding=0, flip=False)
    np.testing.assert_array_equal(augment(images, plain, 3, 1, slice(None)), images)


def test_augmentation_moves_and_mirrors_pixels_and_makes_none_up() -> None:
    images = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4).repeat(3, 1).repeat(400, 0)
    moved = augment(images, ProxySettings(crop_padding=1), 0, 0, slice(None))[:, 0]
    unique = {image.tobytes() for image in moved}
    assert len(unique) == 18, "3 x 3 shifts, each with and without a flip"
    assert images[0, 0].tobytes() in unique and images[0, 0, :, ::-1].tobytes() in unique
    shifted_down = np.concatenate([images[0, 0, 1:], images[0, 0, 2:3]])
    assert shifted_down.tobytes() in unique, "the border is reflected"
    assert augment(images, ProxySettings(crop_padding=9), 0, 0, slice(None)).max() == 15


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_goes_on_from_its_state_as_if_nothing_had_happened(optimizer: str) -> None:
    settings = ProxySettings(optimizer=optimizer, lr=0.01)

    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = build_network("small", 3, 8)
        return model, make_optimizer(settings, model)

    def step(model: torch.nn.Module, update: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
        update.zero_grad()
        torch.nn.functional.cross_entropy(
            model(images), torch.tensor([0, 1, 2, 0, 1, 2])
        ).backward()
        update.step()

    model, update = start()
    for number in range(2):
        step(model, update, number)
    state = {name: value.clone() for name, value in training_state(model, update).items()}
    step(model, update, 2)
    other, other_update = start()
    restore_training(state, other, other_update)
    step(other, other_update, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
