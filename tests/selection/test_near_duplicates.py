from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.selection import near_duplicates
from raypipe.selection.near_duplicates import (
    centroids,
    clusters_for,
    nearest,
    superfluous,
    unit,
)

VECTORS = st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=30)


@given(VECTORS, st.sampled_from([0.5, 0.9, 1.0]), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_one_of_near_duplicates_stays(
    rows: list[tuple[int, ...]], threshold: float, safe: int
) -> None:
    vectors, protected = unit(np.array(rows)), np.arange(len(rows)) < safe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "BLOCK", 4)
        gone = superfluous(vectors, threshold, protected)
    similar = vectors.astype(np.float64) @ vectors.T.astype(np.float64) >= threshold - 1e-5
    stays: list[int] = []
    for row in range(len(rows)):
        if protected[row] or not similar[row, stays].any():
            stays.append(row)
    assert np.flatnonzero(~gone).tolist() == stays


def test_embeddings_without_direction_are_like_nothing() -> None:
    assert not superfluous(unit(np.zeros((3, 4))), 0.1).any()


def test_clusters_bring_near_duplicates_together() -> None:
    draw = np.random.default_rng(0)
    originals = unit(draw.normal(size=(600, 16)))
    copies = unit(originals + 0.02 * draw.normal(size=originals.shape))
    centroid = centroids(originals, 8)
    assert centroid.shape == (8, 16)
    assert np.array_equal(centroid, centroids(originals, 8))
    first, second = nearest(originals, centroid), nearest(copies, centroid)
    assert (first == second).mean() > 0.9
    assert len(np.unique(first)) == 8


def test_few_samples_are_one_cluster() -> None:
    assert [clusters_for(samples) for samples in (0, 8192, 8193, 1 << 20)] == [1, 1, 3, 256]
