from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe import storage
from raypipe.report import embeddings
from raypipe.report.embeddings import principal_axes, scan_embeddings
from raypipe.report.page import build
from raypipe.report.score_scan import HighestPicks, Pick
from raypipe.report.summary import collect
from raypipe.runs.run import Run


def pick(row: int) -> Pick:
    return Pick(str(row), "f", None, 0.0)


@given(
    st.lists(st.one_of(st.floats(-5, 5), st.just(float("nan"))), max_size=40),
    st.integers(0, 8),
    st.integers(1, 9),
)
def test_highest_is_what_a_sort_gives(values: list[float], size: int, step: int) -> None:
    best = HighestPicks(size)
    for start in range(0, len(values), step):
        best.offer(
            np.array(values[start : start + step]), lambda row, start=start: pick(start + row)
        )
    found = [values[int(item.sample_id)] for item in best.picks()]
    assert found == sorted((value for value in values if value == value), reverse=True)[:size]


@pytest.mark.parametrize("shape", [(200, 5), (20, 60)])
def test_principal_axes_find_the_directions_of_largest_variance(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=shape) * 0.01
    vectors[:, 1] += random.normal(size=shape[0]) * 5
    vectors[:, 3] += random.normal(size=shape[0]) * 2
    found = principal_axes(vectors.astype(np.float32), np.zeros(shape[0]))
    assert found is not None
    for axis, column in ((0, 1), (1, 3)):
        assert abs(np.corrcoef(found.position[:, axis], vectors[:, column])[0, 1]) > 0.9
    assert found.explained[0] > found.explained[1] > 0
    assert sum(found.explained) == pytest.approx(1, abs=0.01)


def test_there_is_no_map_of_what_does_not_vary() -> None:
    assert principal_axes(np.ones((10, 4), np.float32), np.zeros(10)) is None
    assert principal_axes(np.zeros((2, 4), np.float32), np.zeros(2)) is None
    assert principal_axes(np.full((9, 4), np.nan, np.float32), np.zeros(9)) is None


def test_scores_are_matched_by_id_where_the_order_differs(make_run: Callable[..., Run]) -> None:
    run = make_run()
    before = scan_embeddings(run, 50)
    for file, table in storage.iter_tables(run.path("scores")):
        storage.write_table(
            run.path("scores", file),
            table.slice(0, len(table) - 1).take(list(range(len(table) - 1))[::-1]),
        )
    after = scan_embeddings(run, 50)
    known = {item.sample_id: item.score for item in before.suspects}
    assert {item.sample_id for item in after.suspects} <= set(known)
    assert len(after.suspects) >= len(known) - 4
    assert all(known[item.sample_id] == item.score for item in after.suspects)


def test_labels_are_checked_whatever_the_score(make_run: Callable[..., Run]) -> None:
    run = make_run()
    low = collect(run).grids["suspects"]
    about = storage.read_json(run.path("extrapolator", "extrapolator.json"))
    storage.write_json(run.path("extrapolator", "extrapolator.json"), {**about, "score": "el2n"})
    high = collect(run).grids["suspects"]
    assert low == high and {item.score > 0 for item in low} == {True, False}
    page = Path(build(run)).read_text("utf-8")
    assert (
        "The samples that it contradicts most are shown, whatever their score." in page
        and "The easiest samples." in page
        and "Every keep-list drops" not in page
    )


def test_only_so_many_shards_are_read(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(fragments=9)
    monkeypatch.setattr(embeddings, "MAX_SHARDS", 4)
    monkeypatch.setattr(embeddings, "MAP_SHARDS", 2)
    monkeypatch.setattr(embeddings, "MAP_SAMPLES", 30)
    read: list[str] = []
    original = storage.read_table
    monkeypatch.setattr(
        storage, "read_table", lambda uri, columns=None: read.append(uri) or original(uri, columns)
    )
    found = scan_embeddings(run, 5)
    assert (found.shards_read, found.shards) == (4, 9)
    assert len(read) == 8  # embeddings and scores
    assert found.map is not None
    assert len(found.map.score) <= 30


def test_a_damaged_shard_is_left_out(make_run: Callable[..., Run]) -> None:
    run = make_run()
    storage.write_bytes(run.path("embeddings", "f001.parquet"), b"PAR1")
    found = scan_embeddings(run, 50)
    assert (found.shards_read, found.shards) == (3, 4)
    assert all(item.fragment != "f001" for item in found.suspects)
