from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from raypipe.errors import RaypipeError
from raypipe.extrapolators import neighbours as module
from raypipe.extrapolators.neighbours import ClassNeighbours, NeighbourIndex


def brute_force(
    vectors: np.ndarray, queries: np.ndarray, k: int, exclude: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    distance = np.sqrt(((queries[:, None].astype(np.float64) - vectors[None]) ** 2).sum(2))
    if exclude is not None:
        distance[np.arange(len(queries)), exclude] = np.inf
    row = np.lexsort((np.broadcast_to(np.arange(len(vectors)), distance.shape), distance), axis=1)[
        :, :k
    ]
    return np.take_along_axis(distance, row, 1), row


@pytest.mark.parametrize("queries", [1, 5, 70])
def test_search_is_exact(queries: int) -> None:
    rng = np.random.default_rng(0)
    # with a large common offset |a|^2 + |b|^2 - 2ab loses its digits
    vectors, points = (
        rng.normal(size=(200, 7)).astype(np.float32) + 300,
        rng.normal(size=(queries, 7)).astype(np.float32) + 300,
    )
    distance, row = NeighbourIndex(vectors).search(points, 9)
    true_distance, true_row = brute_force(vectors, points, 9)
    np.testing.assert_allclose(distance, true_distance, rtol=1e-5)
    assert (row == true_row).mean() > 0.97  # only near-equal distances may differ
    assert distance.dtype == np.float32 and row.dtype == np.int64


def test_a_sample_is_never_its_own_neighbour_even_among_duplicates() -> None:
    vectors = np.repeat(np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32), 6, axis=0)
    rows = np.arange(60)
    distance, row = NeighbourIndex(vectors).search(vectors, 5, exclude=rows)
    assert not (row == rows[:, None]).any()
    assert (row // 6 == rows[:, None] // 6).all() and (distance == 0).all()


def test_k_is_cut_to_what_there_is() -> None:
    vectors = np.eye(3, dtype=np.float32)
    index = NeighbourIndex(vectors)
    assert index.search(vectors, 10)[1].shape == (3, 3)
    assert index.search(vectors, 10, exclude=np.arange(3))[1].shape == (3, 2)
    assert NeighbourIndex(vectors[:1]).search(vectors[:1], 4, exclude=np.zeros(1, np.int64))[
        1
    ].shape == (1, 0)
    assert index.search(vectors[:0], 2)[0].shape == (0, 2)


def test_equal_distances_come_by_row() -> None:
    vectors = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    assert NeighbourIndex(vectors).search(np.zeros((1, 2), np.float32), 4)[1].tolist() == [
        [0, 1, 2, 3]
    ]


def test_the_index_is_restored_from_its_tensors() -> None:
    rng = np.random.default_rng(1)
    index, queries = (
        NeighbourIndex(rng.normal(size=(50, 4)).astype(np.float32)),
        rng.normal(size=(30, 4)).astype(np.float32),
    )
    tensors = {f"a.{name}": value for name, value in index.tensors().items()}
    assert list(tensors) == ["a.vectors"]
    for before, after in zip(
        index.search(queries, 6), NeighbourIndex.from_tensors(tensors, "a.").search(queries, 6)
    ):
        np.testing.assert_array_equal(before, after)


def clustered(count: int, width: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centre, place = 2 * rng.normal(size=(15, width)), rng.integers(0, 15, count)
    return (centre[place] + rng.normal(size=(count, width))).astype(np.float32)


@pytest.fixture(scope="module")
def lists() -> NeighbourIndex:
    return NeighbourIndex(clustered(3000), exact=2000, k=10)


def test_many_vectors_are_searched_by_lists_with_a_measured_recall(lists) -> None:
    assert NeighbourIndex(clustered(3000), exact=3000).quality.as_dict() == {
        "kind": "exact",
        "vectors": 3000,
        "lists": 0,
        "effort": 0,
        "recall": 1.0,
        "k": 0,
        "tried": [],
        "note": "",
    }
    about = lists.quality.as_dict()
    assert (about["kind"], about["vectors"], about["lists"], about["k"]) == ("ivf", 3000, 110, 10)
    assert about["recall"] >= 0.95 and about["effort"] < 30
    queries = clustered(3200)[3000:]
    true_distance, _ = brute_force(lists.vectors, queries, 10)
    distance, row = lists.search(queries, 10)
    recall = (distance <= true_distance[:, -1:] * (1 + 1e-5)).mean()
    assert recall == pytest.approx(about["recall"], abs=0.03)
    np.testing.assert_allclose(
        distance, np.linalg.norm(lists.vectors[row] - queries[:, None], axis=2), rtol=1e-5
    )
    assert (np.diff(distance) >= 0).all() and all(len(set(rows)) == 10 for rows in row.tolist())
    rows = np.arange(100)
    assert not (lists.search(lists.vectors[:100], 10, exclude=rows)[1] == rows[:, None]).any()
    again = NeighbourIndex(clustered(3000), exact=2000, k=10)
    np.testing.assert_array_equal(again.search(queries, 10)[1], row)


def test_effort_is_raised_until_enough_is_found(monkeypatch) -> None:
    monkeypatch.setattr(module, "FIRST_EFFORT", 1)
    quality = NeighbourIndex(clustered(3000), exact=2000, k=10).quality
    efforts, recalls = zip(*quality.tried)
    assert (
        efforts[:2] == (1, 2)
        and all(recall < 0.95 for recall in recalls[:-1])
        and recalls[-1] >= 0.95
    )
    assert (quality.effort, quality.recall) == quality.tried[-1]
    assert f"raised from 1 to {quality.effort} of 110 lists" in quality.note


def test_the_search_is_exact_where_lists_find_too_little(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_EFFORT_DIVISOR", 60)
    index = NeighbourIndex(clustered(3000), exact=2000, k=10)
    assert (
        index.quality.as_dict()["kind"] == "exact"
        and index.quality.recall == 1
        and len(index.quality.tried) == 1
    )
    assert "so an exact, slower search is used" in index.quality.note and list(index.tensors()) == [
        "vectors"
    ]
    queries = clustered(3050)[3000:]
    np.testing.assert_array_equal(
        index.search(queries, 10)[1], NeighbourIndex(clustered(3000)).search(queries, 10)[1]
    )


@pytest.mark.parametrize(
    "device",
    [
        "cpu:0",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
@pytest.mark.parametrize("offset", [0, 300])
@pytest.mark.parametrize("values", [1 << 20, 1000])
def test_the_search_by_products_finds_the_same(
    device: str, offset: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PRODUCT_VALUES", values)
    vectors = clustered(800) + np.float32(offset)
    plain, by_product = NeighbourIndex(vectors[:700]), NeighbourIndex(vectors[:700])
    by_product.device = device  # "cpu:0" is not "cpu": the code path of a GPU, on a CPU
    few, own = vectors[:50], np.arange(50)
    for queries, k, exclude in (
        (vectors[700:], 20, None),
        (few, 5, own),
        (few[:1], 700, None),
        (few[:0], 3, None),
    ):
        for result, expected in zip(
            by_product.search(queries, k, exclude), plain.search(queries, k, exclude)
        ):
            np.testing.assert_array_equal(result, expected)
    assert by_product._device_vectors is not None and plain._device_vectors is None


def test_lists_that_hold_too_few_are_no_gap(lists) -> None:
    exact, queries = NeighbourIndex(lists.vectors), clustered(3040)[3000:]
    many = lists.search(queries, 2500)
    for result, expected in zip(many, exact.search(queries, 2500)):
        np.testing.assert_array_equal(result, expected)
    rows = np.arange(40)
    for result, expected in zip(
        lists.search(lists.vectors[:40], 2999, rows), exact.search(lists.vectors[:40], 2999, rows)
    ):
        np.testing.assert_array_equal(result, expected)


def test_lists_of_equal_vectors() -> None:
    index = NeighbourIndex(np.ones((300, 3), np.float32), exact=100)
    distance, row = index.search(np.ones((2, 3), np.float32), 5)
    assert (distance == 0).all() and (np.diff(row) > 0).all()


def test_lists_are_restored_without_learning_them_again(lists, monkeypatch) -> None:
    monkeypatch.setattr(NeighbourIndex, "_build", None)
    tensors = {f"a.{name}": np.array(value) for name, value in lists.tensors().items()}
    again, queries = NeighbourIndex.from_tensors(tensors, "a."), clustered(3100)[3000:]
    assert again.quality == lists.quality
    for before, after in zip(lists.search(queries, 10), again.search(queries, 10)):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("list", lambda value: value + 1),
        ("list", lambda value: value - 1),
        ("list", lambda value: value[1:]),
        ("list", lambda value: value.astype(np.float32)),
        ("centroid", lambda value: value[:, 1:]),
        ("centroid", lambda value: value[:-1]),
        ("centroid", lambda value: value * np.nan),
        ("centroid", lambda value: value.astype(np.float64) * 1e300),
        ("tried", lambda value: value * 0),
        ("tried", lambda value: value + 1000),
        ("tried", lambda value: value[:0]),
        ("tried", lambda value: value[0]),
        ("vectors", lambda value: value[1:]),
        ("vectors", lambda value: value[:, 1:]),
        ("vectors", lambda value: value * np.inf),
        ("vectors", lambda value: value[0]),
    ],
)
def test_damaged_tensors_are_an_error(
    lists, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    tensors = lists.tensors()
    with pytest.raises(RaypipeError, match=r"damaged|not finite|cannot be searched"):
        NeighbourIndex.from_tensors({**tensors, name: change(tensors[name])}, "")
    with pytest.raises(KeyError, match=name):
        NeighbourIndex.from_tensors(
            {key: value for key, value in tensors.items() if key != name}, ""
        )


def test_only_large_classes_have_lists(monkeypatch) -> None:
    vectors, label = clustered(3000), np.repeat([0, 1, -1], [2400, 400, 200])
    by_class, queries = ClassNeighbours(vectors, label, exact=1000, k=10), clustered(3050)[3000:]
    assert list(by_class.quality()) == [0] and by_class.quality()[0].recall >= 0.95
    assert set(by_class.lists()) == {"0.centroid", "0.list", "0.tried"}
    monkeypatch.setattr(NeighbourIndex, "_build", None)
    again = ClassNeighbours(vectors, label, lists=by_class.lists())
    for y in (0, 1):
        labels = np.full(50, y)
        for before, after in zip(
            by_class.search(queries, labels, 10), again.search(queries, labels, 10)
        ):
            np.testing.assert_array_equal(before, after)
    exact = ClassNeighbours(vectors, label).search(queries, labels, 10)[1]
    np.testing.assert_array_equal(by_class.search(queries, labels, 10)[1], exact)
    with pytest.raises(RaypipeError, match="damaged"):
        ClassNeighbours(
            vectors, label, lists={**by_class.lists(), "0.list": by_class.lists()["0.list"][1:]}
        )


def test_values_that_are_not_finite_are_counted() -> None:
    vectors = np.zeros((10, 2), np.float32)
    vectors[[1, 4, 7], 0] = np.nan, np.inf, -np.inf
    with pytest.raises(RaypipeError, match="3 of 10 embeddings"):
        NeighbourIndex(vectors)
    with pytest.raises(RaypipeError, match="3 of 10 embeddings"):
        NeighbourIndex(np.eye(2, dtype=np.float32)).search(vectors, 1)
    with pytest.raises(RaypipeError, match="width 2"):
        NeighbourIndex(np.eye(2, dtype=np.float32)).search(np.zeros((1, 3), np.float32), 1)
    with pytest.raises(RaypipeError, match="cannot be searched"):
        NeighbourIndex(np.zeros((0, 3), np.float32))
