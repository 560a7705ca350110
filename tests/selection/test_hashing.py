from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.selection import hashing
from raypipe.selection.hashing import (
    GOLDEN,
    IdSet,
    canonical_hashes,
    canonical_order,
    hash64,
    hash_range,
    ids_at,
    uniform,
)
from raypipe.selection.quotas import bounded_quotas, even_quotas
from raypipe.selection.statistics import ExactMoments

LAST = 2**64 - 1
NUMBERS = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30
)


def mix(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & LAST
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & LAST
    return state ^ (state >> 31)


def plain_hash(text: str, seed: int) -> int:
    data, state = text.encode(), mix((seed * GOLDEN + 1) & LAST)
    for start in range(0, len(data), 8):
        state = mix(state ^ int.from_bytes(data[start : start + 8], "little"))
    return mix(state ^ len(data))


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12),
    st.integers(0, 2**63 - 1),
    st.data(),
)
@settings(deadline=None)
def test_the_hash_of_many_is_that_of_each(ids: list[str], seed: int, data: st.DataObject) -> None:
    assert hash64(ids, seed).tolist() == [plain_hash(text, seed) for text in ids]
    start = data.draw(st.integers(0, len(ids)))
    # a slice of an Arrow array shares the buffers of the whole
    assert (
        hash64(pa.array(ids, pa.string())[start:], seed).tolist()
        == hash64(ids[start:], seed).tolist()
    )


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_hash_does_not_depend_on_the_ids_hashed_with_it(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    ids = ["é" * (number % 12) for number in range(20)]
    monkeypatch.setattr(hashing, "HASHED_AT_ONCE", at_once)
    assert hash64(pa.array(ids)[5:], 7).tolist() == [plain_hash(text, 7) for text in ids[5:]]


def test_the_hash_does_not_change_between_versions() -> None:
    # a keep-list drawn today must be drawn again tomorrow
    assert hash64(["", "a", "train/cat/0001.jpg"], 7).tolist() == [
        0x8625A2873518DD9D,
        0x875A2C03D4C73493,
        0xC5E8C48BB7DC6EAC,
    ]


def test_hashes_of_ids_that_are_alike_are_spread_evenly() -> None:
    ids = [f"train/{number:07d}.jpg" for number in range(1 << 16)]
    first, second = hash64(ids, 0), hash64(ids, 1)
    for bits in (first >> np.uint64(56), first & np.uint64(255), (first ^ second) >> np.uint64(56)):
        counts = np.bincount(bits.astype(np.int64), minlength=256)
        chi = ((counts - 256) ** 2 / 256).sum()
        assert 255 - 5 * math.sqrt(510) < chi < 255 + 5 * math.sqrt(510)
    assert len(np.unique(first)) == len(ids)
    assert abs(np.corrcoef(uniform(first), uniform(second))[0, 1]) < 5 / 256


def test_an_id_set_finds_what_it_holds_and_notes_it() -> None:
    ids = IdSet(["b", "é", "b", "zz"])
    assert ids.find(["a", "b", "c", "é", "b"]).tolist() == [1, 3, 4]
    assert sorted(ids.ids.filter(pa.array(~ids.met)).to_pylist()) == ["zz"]
    assert ids.find(()).tolist() == [] and IdSet([]).find(["a"]).tolist() == []


def test_equal_hashes_of_different_ids_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "raypipe.selection.hashing.hash64", lambda ids, seed=0: np.zeros(len(ids), np.uint64)
    )
    assert IdSet(["b"]).find(["a", "b"]).tolist() == [1]


def test_names_at_positions_of_lists_and_arrays() -> None:
    for ids in (["a", "b", "c"], pa.array(["a", "b", "c"])):
        assert ids_at(ids, np.array([2, 0])) == ["c", "a"]


@given(NUMBERS)
@settings(deadline=None)
def test_moments_are_exact_in_every_order(values: list[float]) -> None:
    moments = ExactMoments(2)
    moments.add(np.array(values, np.float32), np.ones(len(values), np.int64))
    shuffled = ExactMoments(2)
    for value in random.Random(0).sample(values, len(values)):
        shuffled.add(np.array([value], np.float32), np.array([1]))
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    variance = sum((value - mean) ** 2 for value in exact) / len(exact)
    actual, deviation = moments.mean_and_deviation()
    assert actual.tolist() == [0.0, float(mean)] and moments.total(1) == float(sum(exact))
    assert deviation[1] == math.sqrt(float(variance))
    assert [array.tolist() for array in shuffled.mean_and_deviation()] == [
        actual.tolist(),
        deviation.tolist(),
    ]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
@settings(deadline=None)
def test_a_budget_is_shared_as_the_published_code_does(
    counts: list[int], data: st.DataObject
) -> None:
    total = data.draw(st.integers(0, sum(counts)))
    left, expected = total, {}
    for served, group in enumerate(sorted(range(len(counts)), key=lambda group: counts[group])):
        expected[group] = min(counts[group], left // (len(counts) - served))
        left -= expected[group]
    quotas = even_quotas(np.array(counts), total)
    assert dict(enumerate(quotas.tolist())) == expected
    assert quotas.sum() == total
    if total:
        assert (even_quotas(np.array(counts), total - 1) <= quotas).all()


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=6
    ),
    st.data(),
)
@settings(deadline=None)
def test_bounds_hold_and_what_need_not_change_does_not(
    groups: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    quotas_before, minimum = np.array([g[0] for g in groups]), np.array([g[1] for g in groups])
    maximum = minimum + np.array([g[2] for g in groups])
    total = data.draw(st.integers(int(minimum.sum()), int(maximum.sum())))
    actual = bounded_quotas(quotas_before, minimum, maximum, total)
    assert actual.sum() == total and (actual >= minimum).all() and (actual <= maximum).all()
    if (
        quotas_before.sum() == total
        and (quotas_before >= minimum).all()
        and (quotas_before <= maximum).all()
    ):
        assert (actual == quotas_before).all()


def test_the_canonical_order_depends_on_the_ids_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"folder/{number}.jpg" for number in range(500)]
    expected = [ids[row] for row in canonical_order(ids)]
    assert sorted(expected) == sorted(ids) and expected != ids
    for seed in range(3):
        mixed = random.Random(seed).sample(ids, len(ids))
        assert [mixed[row] for row in canonical_order(mixed)] == expected
        monkeypatch.setattr(
            hashing, "hash64", lambda ids, seed: hash64(ids, seed) & np.uint64(3)
        )  # equal hashes are sorted by id
        shared = [mixed[row] for row in canonical_order(mixed)]
        groups = canonical_hashes(shared)
        assert sorted(zip(groups.tolist(), shared)) == list(zip(groups.tolist(), shared))
        monkeypatch.undo()
    assert canonical_order([]).tolist() == []


@pytest.mark.parametrize("ranges", [1, 3, 8, 1000])
def test_ranges_of_hashes_are_equal_and_ascend(ranges: int) -> None:
    hashes = np.sort(hash64([str(number) for number in range(20_000)]))
    which = hash_range(np.r_[np.uint64(0), hashes, np.uint64(LAST)], ranges)
    assert (which[0], which[-1]) == (0, ranges - 1) and (np.diff(which) >= 0).all()
    counts = np.bincount(which, minlength=ranges)
    assert counts.max() < 1.2 * 20_000 / ranges + 40
