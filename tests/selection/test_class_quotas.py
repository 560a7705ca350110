"""How a list is divided among classes: `select.quotas`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.config import SelectSettings
from raypipe.config.choices import CUTTING_STRATEGIES
from raypipe.selection import STRATEGIES, Chunk, SelectionOptions, select
from raypipe.selection.quotas import class_quotas, recall_quotas


def plain_drop(counts: list[int], total: int, recall: list[float]) -> list[float]:
    """Return DRoP's densities: proportional to 1 - recall, capped at 1, the excess redistributed."""
    density = [0.0] * len(counts)
    error = [1 - r for r in recall]
    while True:
        open_classes = [c for c in range(len(counts)) if density[c] < 1 and counts[c]]
        left = total - sum(d * n for d, n in zip(density, counts, strict=True) if d == 1)
        scale = left / sum(error[c] * counts[c] for c in open_classes)
        for c in open_classes:
            density[c] = min(1.0, scale * error[c])
        if math.isclose(sum(d * n for d, n in zip(density, counts, strict=True)), total):
            return density


@given(
    st.lists(st.tuples(st.integers(0, 200), st.floats(0, 0.99)), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_recall_quotas_are_those_of_drop(classes: list[tuple[int, float]], keep: float) -> None:
    counts = [count for count, _ in classes]
    total = round(keep * sum(counts))
    recall = [r for _, r in classes]
    quotas = recall_quotas(np.array(counts), total, np.array(recall))
    assert quotas.sum() == total
    assert (quotas >= 0).all() and (quotas <= counts).all()
    if total:
        exact = np.array(plain_drop(counts, total, recall)) * counts
        assert np.abs(quotas - exact).max() < 1 + 1e-6


def test_recall_quotas_in_figures() -> None:
    # errors 0.1 and 0.3: shares of 0.25 and 0.75 of the lists, of classes of equal size
    assert recall_quotas(np.array([100, 100]), 80, np.array([0.9, 0.7])).tolist() == [20, 60]
    # the second class would get 120 of its 100 samples; the other gets the rest
    assert recall_quotas(np.array([100, 100]), 160, np.array([0.9, 0.7])).tolist() == [60, 100]
    # an unknown recall counts as the mean of the others
    quotas = recall_quotas(np.array([100, 100, 100]), 60, np.array([0.9, 0.7, np.nan]))
    assert quotas.tolist() == [10, 30, 20]
    # classes without errors share alike
    assert recall_quotas(np.array([10, 30]), 20, np.array([1.0, 1.0])).tolist() == [5, 15]


def test_classes_get_equal_proportional_or_other_shares() -> None:
    counts = np.array([100, 20, 0])
    assert class_quotas(counts, 60).tolist() == [50, 10, 0]
    assert class_quotas(counts, 60, "equal").tolist() == [40, 20, 0]
    assert class_quotas(counts, 30, "equal").tolist() == [15, 15, 0]
    assert class_quotas(counts, 24, "recall", (0.9, 0.9)).tolist() == [20, 4, 0]


@pytest.mark.parametrize("rule", ["equal", "recall"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_quotas_go_with_every_strategy(strategy: str, rule: str) -> None:
    draw = np.random.default_rng(0)
    label = np.repeat(np.arange(3), [200, 120, 60]).astype(np.int32)[draw.permutation(380)]
    vectors = draw.normal(size=(380, 4)).astype(np.float32)
    chunk = Chunk(
        draw.gamma(2, 1, 380).astype(np.float32),
        label,
        [f"s{row}" for row in range(380)],
        draw.exponential(1, 380).astype(np.float32),
        position=0,
    )

    def embedded() -> Iterator[tuple[Chunk, np.ndarray]]:
        yield chunk, vectors

    recall = (0.9, 0.8, 0.4)
    options = SelectionOptions(by_class=True, quotas=rule, recall=recall, strata=2, hard_cutoff=0.1)
    (cut,) = select(lambda _: [chunk], [0.3], strategy, 3, options, embedded=embedded)
    counts = np.bincount(label[cut.mask(chunk)], minlength=3)
    left = np.array([200, 120, 60, 0])
    if strategy in CUTTING_STRATEGIES:
        left = left - left // 10
    assert counts.tolist() == class_quotas(left, 114, rule, recall)[:3].tolist()


def test_quotas_need_classes() -> None:
    assert SelectSettings(strategy="top", quotas="equal").within_classes
    assert not SelectSettings(strategy="top").within_classes
    with pytest.raises(ValueError, match="by_class is false"):
        SelectSettings(strategy="top", quotas="recall", by_class=False)
    assert SelectSettings(strategy="balanced", quotas="equal", by_class=False).quotas == "equal"
