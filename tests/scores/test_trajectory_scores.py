"""Every trajectory score against a slow reference in Python floats, and their common properties."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.scores.registry import SCORES, trajectory_score
from raypipe.scores.trajectory import ScoreError, Trajectory, label_margins

TRAJECTORY_SCORES = sorted(name for name, info in SCORES.items() if info.needs == "trajectory")


def _random(seed: int, epochs: int = 14, samples: int = 6, classes: int = 4) -> Trajectory:
    random = np.random.default_rng(seed)
    # no probability below what float16 can represent: logarithms are cut there (MIN_PROBABILITY)
    logits = 6 * np.tanh(random.normal(0, 2, (epochs, samples, classes)).cumsum(0) / 12)
    probabilities = np.exp(logits - logits.max(2, keepdims=True))
    probabilities /= probabilities.sum(2, keepdims=True)
    return Trajectory.from_probabilities(probabilities, random.integers(0, classes, samples))


def _options(name: str) -> dict:
    return {"dynamic-uncertainty": {"window": 5}, "dual": {"window": 5}, "tdds": {"window": 5}}.get(
        name, {}
    )


# -- the reference computations: p is [epoch][class] of one sample, y its label ------------------


def _dynamic_uncertainty(
    p: list[list[float]], y: int, window: int = 5, variant: str = "official"
) -> float:
    own = [row[y] for row in p]
    windows = [own[start : start + window] for start in range(len(own) - window + 1)]
    if variant == "official":
        return statistics.mean(statistics.stdev(part) for part in windows[:-1])
    if variant == "paper":
        return statistics.mean(statistics.stdev(part) for part in windows)
    return statistics.mean(statistics.pstdev(part) for part in windows[2:])


def _dual(p: list[list[float]], y: int, window: int = 5) -> float:
    own = [row[y] for row in p]
    windows = [own[start : start + window] for start in range(len(own) - window + 1)]
    return statistics.mean(statistics.stdev(part) * (1 - statistics.mean(part)) for part in windows)


def _tdds(
    p: list[list[float]],
    y: int,
    window: int = 5,
    beta: float = 0.9,
    epochs: int | None = None,
    take: str = "first",
) -> float:
    used = epochs or len(p)
    p = p[:used] if take == "first" else p[-used:]
    change = [
        sum(
            abs(b * (math.log(b + 1e-8) - math.log(a + 1e-8)))
            for a, b in zip(p[t], p[t + 1], strict=True)
        )
        for t in range(used - 1)
    ]
    total = 0.0
    for k in range(used - window + 1):
        part = change[k : k + window - 1]
        mean = sum(part) / len(part)
        total += (
            math.sqrt(sum((d - mean) ** 2 for d in part)) * beta * (1 - beta) ** (used - window - k)
        )
    return total


def _el2n(p: list[list[float]], y: int, first: int = 0, last: int = 10) -> float:
    part = p[first:last]
    return statistics.mean(
        math.sqrt(sum((value - (c == y)) ** 2 for c, value in enumerate(row))) for row in part
    )


def _forgetting(p: list[list[float]], y: int, never_learned: str = "hardest") -> float:
    correct = [max(range(len(row)), key=row.__getitem__) == y for row in p]
    if not any(correct):
        return len(p) // 2 + 1 if never_learned == "hardest" else 0
    return sum(before and not after for before, after in itertools.pairwise(correct))


def _aum(p: list[list[float]], y: int) -> float:
    return -statistics.mean(
        math.log(row[y]) - max(math.log(value) for c, value in enumerate(row) if c != y)
        for row in p
    )


def _aum_softmax(p: list[list[float]], y: int) -> float:
    return -statistics.mean(
        row[y] - max(value for c, value in enumerate(row) if c != y) for row in p
    )


def _loss(p: list[list[float]], y: int) -> float:
    return statistics.mean(-math.log(row[y]) for row in p)


def _entropy(p: list[list[float]], y: int) -> float:
    return statistics.mean(-sum(value * math.log(value) for value in row) for row in p)


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("dynamic-uncertainty", {"window": 5}, _dynamic_uncertainty),
        (
            "dynamic-uncertainty",
            {"window": 5, "variant": "paper"},
            lambda p, y: _dynamic_uncertainty(p, y, variant="paper"),
        ),
        (
            "dynamic-uncertainty",
            {"window": 5, "variant": "extrapolation"},
            lambda p, y: _dynamic_uncertainty(p, y, variant="extrapolation"),
        ),
        ("dual", {"window": 5}, _dual),
        ("dual", {"window": 5, "epochs": 8}, lambda p, y: _dual(p[:8], y)),
        ("tdds", {"window": 5}, _tdds),
        (
            "tdds",
            {"window": 5, "beta": 0.3, "epochs": 9},
            lambda p, y: _tdds(p, y, beta=0.3, epochs=9),
        ),
        (
            "tdds",
            {"window": 5, "beta": 0.3, "epochs": 9, "take": "last"},
            lambda p, y: _tdds(p, y, beta=0.3, epochs=9, take="last"),
        ),
        ("el2n", {}, _el2n),
        ("el2n", {"first_epoch": 3, "last_epoch": 4}, lambda p, y: _el2n(p, y, 3, 4)),
        ("forgetting", {}, _forgetting),
        ("forgetting", {"never_learned": "easiest"}, lambda p, y: _forgetting(p, y, "easiest")),
        ("aum", {}, _aum),
        ("aum", {"softmax": True}, _aum_softmax),
        ("loss", {}, _loss),
        ("entropy", {}, _entropy),
    ],
)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 5))
def test_agrees_with_the_reference_computation(
    name: str, options: dict, reference, seed: int, classes: int
) -> None:
    trajectory = _random(seed, classes=classes)
    actual = trajectory_score(name)(trajectory, **options)
    expected = [
        reference(trajectory.probabilities[:, i].astype(float).tolist(), int(trajectory.label[i]))
        for i in range(len(trajectory.label))
    ]
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", TRAJECTORY_SCORES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_does_not_depend_on_order_or_batches_or_names_of_classes(name: str, seed: int) -> None:
    whole = _random(seed, samples=9)
    function, options = trajectory_score(name), _options(name)
    actual = function(whole, **options)
    random = np.random.default_rng(seed)
    order = random.permutation(9)
    moved = Trajectory.from_probabilities(
        whole.probabilities[:, order], whole.label[order], whole.margin[:, order]
    )
    np.testing.assert_array_equal(function(moved, **options), actual[order])
    part = Trajectory.from_probabilities(
        whole.probabilities[:, :4], whole.label[:4], whole.margin[:, :4]
    )
    np.testing.assert_allclose(function(part, **options), actual[:4], rtol=1e-5, atol=1e-7)
    classes = random.permutation(4)
    renamed = Trajectory.from_probabilities(
        whole.probabilities[..., np.argsort(classes)], classes[whole.label], whole.margin
    )
    np.testing.assert_allclose(function(renamed, **options), actual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRAJECTORY_SCORES)
def test_hard_samples_are_kept_before_easy_ones(name: str) -> None:
    """Compare a sample whose prediction keeps changing with one that is correct throughout."""
    random = np.random.default_rng(0)
    own = np.stack([0.5 + 0.35 * random.choice([-1, 1], 20), np.full(20, 0.98)], 1)
    probabilities = np.stack([own, 1 - own], 2)
    actual = trajectory_score(name)(
        Trajectory.from_probabilities(probabilities, np.array([0, 0])), **_options(name)
    )
    assert actual[0] > actual[1]


def test_an_epoch_without_a_sample_takes_the_one_before() -> None:
    trajectory = _random(1)
    holes = trajectory.probabilities.copy()
    holes[0, 2] = np.nan
    holes[5, 2] = np.nan
    holes[6, 2, 1] = np.nan
    filled = Trajectory.from_probabilities(holes, trajectory.label, trajectory.margin)
    np.testing.assert_array_equal(filled.probabilities[0, 2], trajectory.probabilities[1, 2])
    np.testing.assert_array_equal(filled.probabilities[5, 2], trajectory.probabilities[4, 2])
    np.testing.assert_array_equal(filled.probabilities[6, 2], trajectory.probabilities[4, 2])
    assert filled.margin[6, 2] == trajectory.margin[4, 2]
    np.testing.assert_array_equal(
        np.delete(filled.probabilities, 2, 1), np.delete(trajectory.probabilities, 2, 1)
    )


def test_what_cannot_be_scored_is_an_error_with_its_numbers() -> None:
    trajectory = _random(2, epochs=4)
    for name, message in (
        ("dynamic-uncertainty", "at least 11 epochs"),
        ("dual", "at least 10 epochs"),
        ("tdds", "at least 10 epochs"),
    ):
        with pytest.raises(ScoreError, match=message):
            trajectory_score(name)(trajectory)
    with pytest.raises(ScoreError, match="at least 2 epochs"):
        trajectory_score("forgetting")(_random(2, epochs=1))
    with pytest.raises(ScoreError, match="no epochs between first_epoch 9"):
        trajectory_score("el2n")(trajectory, first_epoch=9)
    with pytest.raises(ScoreError, match="'moso' is not a trajectory score"):
        trajectory_score("moso")
    never = trajectory.probabilities.copy()
    never[:, 1] = np.nan
    with pytest.raises(ScoreError, match="1 samples have no finite prediction"):
        Trajectory.from_probabilities(never, trajectory.label)
    with pytest.raises(ScoreError, match=r"labels must be 0\.\.3"):
        Trajectory.from_probabilities(trajectory.probabilities, trajectory.label + 4)
    with pytest.raises(ScoreError, match="two classes"):
        Trajectory.from_probabilities(trajectory.probabilities[..., :1], np.zeros(6, int))


def test_probabilities_of_zero_do_not_make_scores_infinite() -> None:
    probabilities = np.zeros((12, 2, 3), np.float16)
    probabilities[:, 0, 0] = 1
    probabilities[:, 1, 2] = 1
    trajectory = Trajectory.from_probabilities(probabilities, np.array([0, 0]))
    assert np.isfinite(label_margins(probabilities, np.array([0, 0]))).all()
    for name in TRAJECTORY_SCORES:
        assert np.isfinite(trajectory_score(name)(trajectory)).all(), name


def test_empty_sets_and_lonely_classes_are_nothing_special() -> None:
    for name in TRAJECTORY_SCORES:
        empty = Trajectory.from_probabilities(np.zeros((12, 0, 3)), np.zeros(0, int))
        assert trajectory_score(name)(empty).shape == (0,)
