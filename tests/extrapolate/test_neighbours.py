from __future__ import annotations

import faiss
import numpy as np
import pytest

from raypipe.errors import RaypipeError
from raypipe.extrapolate.neighbours import NeighbourIndex


def brute(vectors: np.ndarray, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    distance = np.sqrt(((queries[:, None].astype(np.float64) - vectors[None]) ** 2).sum(2))
    if exclude is not None:
        distance[np.arange(len(queries)), exclude] = np.inf
    row = np.lexsort((np.broadcast_to(np.arange(len(vectors)), distance.shape), distance), axis=1)[:, :k]
    return np.take_along_axis(distance, row, 1), row


@pytest.mark.parametrize("queries", [1, 5, 70])
def test_search_is_exact(queries: int) -> None:
    rng = np.random.default_rng(0)
    # a large common offset is where |a|^2 + |b|^2 - 2ab loses its digits
    vectors, wanted = rng.normal(size=(200, 7)).astype(np.float32) + 300, rng.normal(size=(queries, 7)).astype(np.float32) + 300
    distance, row = NeighbourIndex(vectors).search(wanted, 9)
    true_distance, true_row = brute(vectors, wanted, 9)
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
    assert NeighbourIndex(vectors[:1]).search(vectors[:1], 4, exclude=np.zeros(1, np.int64))[1].shape == (1, 0)
    assert index.search(vectors[:0], 2)[0].shape == (0, 2)


def test_equal_distances_come_by_row() -> None:
    vectors = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    assert NeighbourIndex(vectors).search(np.zeros((1, 2), np.float32), 4)[1].tolist() == [[0, 1, 2, 3]]


def test_bytes_restore_the_index() -> None:
    rng = np.random.default_rng(1)
    index, queries = NeighbourIndex(rng.normal(size=(50, 4)).astype(np.float32)), rng.normal(size=(30, 4)).astype(np.float32)
    data = index.to_bytes()
    assert data.dtype == np.uint8
    for before, after in zip(index.search(queries, 6), NeighbourIndex.from_bytes(data).search(queries, 6)):
        np.testing.assert_array_equal(before, after)


def test_damaged_bytes_are_an_error() -> None:
    data = NeighbourIndex(np.eye(5, dtype=np.float32)).to_bytes()
    with pytest.raises(RaypipeError, match="damaged"):
        NeighbourIndex.from_bytes(data[: len(data) // 2])
    other = faiss.serialize_index(faiss.IndexFlatIP(3))
    with pytest.raises(RaypipeError, match="IndexFlat"):
        NeighbourIndex.from_bytes(other)


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
