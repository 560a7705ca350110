from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.config import SelectSettings
from raypipe.config.choices import (
    RANDOM_STRATEGIES,
    STRATEGY_NAMES,
    STRATEGY_TEXTS,
)
from raypipe.errors import ConfigError, StageError
from raypipe.selection import (
    STRATEGIES,
    Chunk,
    Selection,
    id_hash,
    order_key,
    proportional_quotas,
    radix_select,
    select,
)

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 1.0)
# few distinct values, so that ties are common; and any float32
SCORES = st.one_of(
    st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1e-45, -1e-45, 3e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
SAMPLES = st.lists(st.tuples(SCORES, st.integers(-1, 3)), max_size=60)


def stream(
    scores: list[float], labels: list[int], ids: list[str], size: int = 7
) -> Callable[[bool], Iterator[Chunk]]:
    def chunks(with_ids: bool) -> Iterator[Chunk]:
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            yield Chunk(
                np.array(scores[part], np.float32),
                np.array(labels[part], np.int32),
                ids[part] if with_ids else (),
            )

    return chunks


def kept(cut: Selection, chunks: Callable[[bool], Iterator[Chunk]]) -> set[str]:
    return {chunk.sample_id[i] for chunk in chunks(True) for i in np.flatnonzero(cut.mask(chunk))}


def sorted_answer(scores: list[float], ids: list[str], count: int) -> set[str]:
    order = sorted(range(len(ids)), key=lambda i: (-np.float32(scores[i]), id_hash(ids[i])))
    return {ids[i] for i in order[:count]}


@given(SAMPLES, st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_top_is_what_a_full_sort_gives(samples: list[tuple[float, int]], size: int) -> None:
    scores, labels = [score for score, _ in samples], [label for _, label in samples]
    ids = [f"s{i}" for i in range(len(samples))]
    chunks = stream(scores, labels, ids, size)
    lists = [kept(cut, chunks) for cut in select(chunks, FRACTIONS, "top")]
    for fraction, actual in zip(FRACTIONS, lists, strict=True):
        assert actual == sorted_answer(scores, ids, round(fraction * len(ids)))
    for smaller, larger in itertools.pairwise(lists):
        assert smaller <= larger


@given(SAMPLES, st.sampled_from([1 << 6, 1 << 9, 1 << 24]))
@settings(max_examples=150, deadline=None)
def test_balanced_is_what_a_full_sort_of_each_class_gives(
    samples: list[tuple[float, int]], counters: int
) -> None:
    scores, labels = [score for score, _ in samples], [label for _, label in samples]
    ids = [f"s{i}" for i in range(len(samples))]
    chunks = stream(scores, labels, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radix_select, "MAX_COUNTERS", counters)  # few counters: more passes
        cuts = select(chunks, FRACTIONS, "balanced", classes=4)
    for fraction, cut in zip(FRACTIONS, cuts, strict=True):
        expected: set[str] = set()
        sizes = np.array([labels.count(group) for group in (0, 1, 2, 3, -1)])
        quotas = proportional_quotas(sizes, round(fraction * len(ids)))
        for group, quota in zip((0, 1, 2, 3, -1), quotas, strict=True):
            members = [i for i, label in enumerate(labels) if label == group]
            expected |= sorted_answer(
                [scores[i] for i in members], [ids[i] for i in members], int(quota)
            )
        actual = kept(cut, chunks)
        assert actual == expected
        assert cut.count == len(actual) == round(fraction * len(ids))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0, 1))
@settings(deadline=None)
def test_quotas_sum_up_and_stay_within_one_of_the_exact_share(
    counts: list[int], fraction: float
) -> None:
    sizes = np.array(counts)
    total = round(fraction * int(sizes.sum()))
    quotas = proportional_quotas(sizes, total)
    assert quotas.sum() == total
    assert (quotas <= sizes).all() and (quotas >= 0).all()
    if sizes.sum():
        assert (abs(quotas - total * sizes / sizes.sum()) < 1).all()


def test_the_smaller_class_gets_an_equal_remainder() -> None:
    assert proportional_quotas(np.array([3, 1]), 2).tolist() == [1, 1]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=40)
)
def test_keys_have_the_order_of_the_scores(scores: list[float]) -> None:
    key = order_key(np.array(scores, np.float32))
    for a, b in zip(range(len(scores)), range(1, len(scores)), strict=False):
        assert (key[a] < key[b]) == (scores[a] < scores[b])
        assert (key[a] == key[b]) == (scores[a] == scores[b])


def test_ties_do_not_depend_on_the_order_of_the_stream() -> None:
    ids = [f"folder/{i}.jpg" for i in range(500)]
    first = stream([1.0] * 500, [0] * 500, ids)
    shuffled = random.Random(0).sample(ids, 500)
    second = stream([1.0] * 500, [0] * 500, shuffled, size=50)
    one = kept(select(first, [0.3])[0], first)
    assert len(one) == 150
    assert one == kept(select(second, [0.3])[0], second)
    assert one != set(ids[:150])


def test_a_large_stream_agrees_with_a_sort() -> None:
    random_state = np.random.default_rng(0)
    scores = random_state.standard_t(2, 40_000).astype(np.float32).round(2)
    labels = random_state.integers(-1, 20, 40_000).astype(np.int32)
    ids = [f"{i:06d}" for i in range(40_000)]
    chunks = stream(scores.tolist(), labels.tolist(), ids, size=1000)
    (cut,) = select(chunks, [0.37])
    assert kept(cut, chunks) == sorted_answer(scores.tolist(), ids, 14_800)


def test_sample_ids_are_read_only_when_ties_must_be_broken() -> None:
    asked: list[bool] = []

    def chunks(with_ids: bool) -> Iterator[Chunk]:
        asked.append(with_ids)
        yield Chunk(
            np.arange(10, dtype=np.float32),
            np.zeros(10, np.int32),
            [str(i) for i in range(10)] if with_ids else (),
        )

    select(chunks, [0.5])
    assert asked == [False, False]


def test_scores_without_order_are_refused_with_their_number() -> None:
    chunks = stream([0.0, float("nan"), float("inf"), 1.0], [0] * 4, list("abcd"))
    with pytest.raises(StageError, match=r"2 of 4 scores are not finite"):
        select(chunks, [0.5])


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_bad_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="not a fraction"):
        select(stream([0.0], [0], ["a"]), [fraction])


def test_an_unknown_strategy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'best' is not one of random, top"):
        select(stream([0.0], [0], ["a"]), [0.5], "best")


def test_a_label_beyond_the_classes_is_refused() -> None:
    with pytest.raises(StageError, match="label 7 among the scores, but the source has 4 classes"):
        select(stream([0.0], [7], ["a"]), [0.5], "balanced", classes=4)


def test_names_texts_and_functions_of_the_strategies_agree() -> None:
    for name in ("auto", *STRATEGIES):
        assert SelectSettings(strategy=name).strategy == name
    assert STRATEGY_NAMES == tuple(STRATEGIES) == tuple(STRATEGY_TEXTS)
    assert (
        tuple(name for name, strategy in STRATEGIES.items() if strategy.draws_at_random)
        == RANDOM_STRATEGIES
    )
