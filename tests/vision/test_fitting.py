"""One training on some rows of the images, and its test."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raypipe.config import AdversarySettings, ProxySettings
from raypipe.errors import StageError
from raypipe.plugins import code_allowed
from raypipe.vision import fitting, training

SETTINGS = ProxySettings(
    model="small", image_size=8, epochs=2, batch_size=16, checkpoints=1, flip=False, crop_padding=0
)
HALF = ([0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def squares() -> tuple[np.ndarray, np.ndarray]:
    """Dark squares of class 0 and light ones of class 1, with noise."""
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 96)
    pixels = np.clip(
        60 + 130 * label[:, None, None, None] + random.normal(0, 20, (96, 3, 8, 8)), 0, 255
    ).astype(np.uint8)
    return pixels, label.astype(np.int64)


def test_it_learns_from_its_rows_and_no_others(squares: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, label = squares
    rows = np.arange(64)
    spoiled, wrong = pixels.copy(), label.copy()
    spoiled[64:], wrong[64:] = 0, 1
    first = fitting.fit(SETTINGS, pixels, label, rows, 2, HALF)
    second = fitting.fit(SETTINGS, spoiled, wrong, rows, 2, HALF)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    found = fitting.test(first, pixels[64:], label[64:], 2)
    assert found.accuracy > 0.9 and first.training


def test_a_training_that_was_interrupted_ends_alike(squares: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, label = squares
    states: list[fitting.State] = []
    rows, settings = np.arange(50), SETTINGS.model_copy(update={"crop_padding": 1})
    whole = fitting.fit(
        settings,
        pixels,
        label,
        rows,
        2,
        HALF,
        steps=10,
        save=lambda state: states.append({k: v.clone() for k, v in state.items()}),
    )
    assert [int(state["epoch"]) for state in states] == [
        0,
        1,
        2,
    ]  # 4 steps an epoch, the last one cut short
    again = fitting.fit(settings, pixels, label, rows, 2, HALF, steps=10, state=states[1])
    other = fitting.fit(settings, pixels, label, rows, 2, HALF, steps=8)
    weights = [
        torch.cat([value.flatten().float() for value in model.state_dict().values()])
        for model in (whole, again, other)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


class Counted:
    """Two thirds of the rows in every epoch; it keeps count of what it is told."""

    def __init__(self, weight: float = 1.0) -> None:
        self.calls: list[tuple[int, float]] = []
        self.loss = torch.full((50,), float("nan"))
        self._weight = weight

    def choose(self, epoch: int, progress: float) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append((epoch, progress))
        rows = np.flatnonzero(np.arange(50) % 3 != epoch % 3)
        return rows, np.full(len(rows), self._weight, np.float32)

    def record(self, rows: np.ndarray, losses: np.ndarray) -> None:
        self.loss[rows] = torch.from_numpy(losses)

    def state(self) -> fitting.State:
        return {"rows.loss": self.loss.clone()}

    def restore(self, state: fitting.State) -> None:
        self.loss = state["rows.loss"].clone()


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def test_rows_that_change_between_epochs(squares: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, label = squares
    rows = Counted()
    states: list[fitting.State] = []
    whole = fitting.fit(
        SETTINGS,
        pixels,
        label,
        rows,
        2,
        HALF,
        steps=8,
        save=lambda state: states.append({k: v.clone() for k, v in state.items()}),
    )
    # 33 or 34 samples are 3 steps of at most 16
    assert rows.calls == [(0, 0.0), (1, 3 / 8), (2, 6 / 8)]
    assert torch.isfinite(rows.loss).all() and (rows.loss > 0).all()
    resumed = Counted()
    again = fitting.fit(SETTINGS, pixels, label, resumed, 2, HALF, steps=8, state=states[0])
    assert resumed.calls == rows.calls[1:] and torch.equal(resumed.loss, rows.loss)
    assert torch.equal(flat(whole), flat(again))
    lighter = fitting.fit(SETTINGS, pixels, label, Counted(0.5), 2, HALF, steps=8)
    assert not torch.equal(flat(whole), flat(lighter))
    with pytest.raises(ValueError, match="need `steps`"):
        fitting.fit(SETTINGS, pixels, label, Counted(), 2, HALF)


def test_equal_rows_and_weights_of_one_are_the_training_on_these_rows(
    squares: tuple[np.ndarray, np.ndarray],
) -> None:
    pixels, label = squares

    class All(Counted):
        def choose(self, epoch: int, progress: float) -> tuple[np.ndarray, np.ndarray]:
            return np.arange(50), np.ones(50, np.float32)

    fixed = fitting.fit(SETTINGS, pixels, label, np.arange(50), 2, HALF, steps=8)
    chosen = fitting.fit(SETTINGS, pixels, label, All(), 2, HALF, steps=8)
    torch.testing.assert_close(flat(fixed), flat(chosen), rtol=1e-4, atol=1e-5)


def test_an_adversarial_training_goes_by_what_an_attack_cannot_change() -> None:
    """A faint chequered pattern always tells the class; brightness usually does.

    Within 16/255, the pattern can be turned into that of the other class.
    """
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 192)
    bright = np.where(random.random(192) < 0.9, label, 1 - label)
    chequered = np.where(np.indices((8, 8)).sum(0) % 2, 8, -8) * (
        2 * label[:, None, None, None] - 1
    )
    pixels = (
        70 + 110 * bright[:, None, None, None] + chequered + random.integers(-3, 4, (192, 3, 8, 8))
    ).astype(np.uint8)
    adversary = AdversarySettings(eps="16/255", step_size="8/255", iterations=4)
    settings, rows, found = SETTINGS.model_copy(update={"epochs": 6}), np.arange(128), {}
    for name, given in (("plain", None), ("adversarial", adversary)):
        model = fitting.fit(
            settings.model_copy(update={"adversary": given}), pixels, label, rows, 2, HALF
        )
        model.train()
        robust = [
            fitting.test(model, pixels[128:], label[128:], 2, adversary=adversary).accuracy
            for _ in range(2)
        ]
        assert robust[0] == robust[1] and model.training
        found[name] = robust[0], fitting.test(model, pixels[128:], label[128:], 2).accuracy
    assert found["adversarial"][0] > found["plain"][0] + 0.2, found
    assert found["plain"][1] >= found["adversarial"][1] and all(
        robust <= clean for robust, clean in found.values()
    )


def test_the_learning_rate_ends_with_the_steps(
    squares: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    rate = training.learning_rate
    monkeypatch.setattr(
        training,
        "learning_rate",
        lambda settings, step, steps: asked.append((step, steps)) or rate(settings, step, steps),
    )
    fitting.fit(SETTINGS, *squares, np.arange(40), 2, HALF, steps=7)
    assert asked == [(step, 7) for step in range(7)]
    assert fitting.steps_of(SETTINGS, 40) == 6 and fitting.steps_of(SETTINGS, 96) == 12


def test_the_callers_random_numbers_are_left_alone(squares: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fitting.fit(SETTINGS, *squares, np.arange(16), 2, HALF, steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_trained_is_refused(squares: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(StageError, match="without labelled samples"):
        fitting.fit(SETTINGS, *squares, np.zeros(0, np.int64), 2, HALF)
    with pytest.raises(StageError, match=r"the loss is nan.*lower lr"):
        fitting.fit(
            SETTINGS.model_copy(update={"lr": 1e30, "schedule": "constant"}),
            *squares,
            np.arange(64),
            2,
            HALF,
        )


class NotFinite(torch.nn.Module):
    """A network whose outputs are finite in eval mode only."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.last = torch.nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(images.mean((2, 3)) * (float("nan") if self.training else 1.0))


def not_finite(classes: int, image_size: int, channels: int) -> torch.nn.Module:
    return NotFinite(classes)


def black(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.zeros_like(image)


def test_a_network_that_returns_nan_in_training_is_named(
    squares: tuple[np.ndarray, np.ndarray],
) -> None:
    name = f"{__name__}:not_finite"
    own = SETTINGS.model_copy(update={"model": name})
    with code_allowed(), pytest.raises(StageError, match=rf"nan .* {name} .*fix the network$"):
        fitting.fit(own, *squares, np.arange(64), 2, HALF)


def test_augmentation_of_the_users_own_is_applied(squares: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, label = squares
    own = SETTINGS.model_copy(update={"augment": f"{__name__}:black"})
    with code_allowed():
        augmented = fitting.fit(
            own, pixels, label, np.arange(64), 2, HALF, keys=np.arange(len(pixels))
        )
        with pytest.raises(ValueError, match="needs `keys`"):
            fitting.fit(own, pixels, label, np.arange(64), 2, HALF)
    plain = fitting.fit(SETTINGS, np.zeros_like(pixels), label, np.arange(64), 2, HALF)
    for a, b in zip(augmented.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_accuracy_by_class() -> None:
    class FixedPrediction(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(pixels[:, 0, 0, 0].long(), 4).float()

    predicted = np.array([0, 0, 1, 1, 3, 0])
    label = np.array([0, 0, 1, 1, 1, 3])
    found = fitting.test(
        FixedPrediction(),
        np.broadcast_to(predicted[:, None, None, None], (6, 3, 2, 2)).astype(np.uint8),
        label,
        4,
    )  # type: ignore[arg-type]
    assert found.accuracy == pytest.approx(4 / 6) and found.worst_class == 3
    np.testing.assert_allclose(found.per_class, [1, 2 / 3, np.nan, 0])


def test_statistics_of_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 4), dtype=np.uint8)
    mean, std = fitting.statistics_of(images, chunk=7)
    np.testing.assert_allclose(mean, images.mean((0, 2, 3)) / 255, rtol=1e-5)
    np.testing.assert_allclose(std, images.std((0, 2, 3)) / 255, rtol=1e-5)
