"""A change of a listing touches few of its runs, whatever it is; old indices keep their runs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from raypipe.sources.cuts import Cuts, divide
from raypipe.sources.smallfiles import Member, file_runs, path_hash

PATHS = [f"class-{number // 500}/{number:05d}.jpg" for number in range(3000)]


def runs_of(paths: Sequence[str], limit: int, cuts: Cuts = Cuts.LOWEST_HASH) -> list[list[str]]:
    return list(divide(paths, path_hash, limit, cuts))


@pytest.mark.parametrize("limit", [1, 2, 3, 16, 64, 1024, 5000])
@pytest.mark.parametrize("cuts", Cuts)
def test_runs_hold_everything_in_order_and_are_bounded(limit: int, cuts: Cuts) -> None:
    runs = runs_of(PATHS, limit, cuts)
    assert [path for run in runs for path in run] == PATHS
    assert max(map(len, runs)) <= limit and all(runs)
    if cuts is Cuts.LOWEST_HASH:  # none but the last is tiny
        assert all(2 * len(run) >= limit for run in runs[:-1])
    assert runs_of([], limit, cuts) == []


def touched(limit: int, cuts: Cuts) -> list[int]:
    """Runs that are new after one image was added, for 200 images at random places."""
    before = {tuple(run) for run in runs_of(PATHS, limit, cuts)}
    draw, counts = random.Random(0), []
    for number in range(200):
        place = draw.randrange(len(PATHS))
        added = [*PATHS[:place], f"{PATHS[place]}-{number}.png", *PATHS[place:]]
        counts.append(len({tuple(run) for run in runs_of(added, limit, cuts)} - before))
    return counts


def test_an_added_image_changes_one_or_two_runs() -> None:
    assert max(touched(256, Cuts.LOWEST_HASH)) <= 2
    counts = touched(64, Cuts.LOWEST_HASH)  # with short runs, their ends move more often
    assert sum(counts) / len(counts) < 1.25 and counts.count(1) > 180
    assert sum(touched(64, Cuts.MARKED)) / len(counts) > 1.6


def test_so_does_a_removed_image() -> None:
    before = {tuple(run) for run in runs_of(PATHS, 256)}
    counts = []
    for place in range(0, len(PATHS), 50):
        left = [*PATHS[:place], *PATHS[place + 1 :]]
        counts.append(len({tuple(run) for run in runs_of(left, 256)} - before))
    # the end of a run itself can be removed
    assert max(counts) <= 3 and sum(counts) / len(counts) < 1.1


def test_a_new_class_in_the_middle_leaves_the_others_alone() -> None:
    before = {tuple(run) for run in runs_of(PATHS, 64)}
    new = [f"class-2b/{number:05d}.jpg" for number in range(300)]
    after = {tuple(run) for run in runs_of(sorted([*PATHS, *new]), 64)}
    assert len(after - before) <= 300 / 32 + 3


def test_runs_of_an_old_index_are_those_of_version_0_2() -> None:
    """As the loop of 0.2.0 made them, with the fingerprint that names their fragments."""
    listed = [(Member(path), 10, f"stamp-{path}") for path in PATHS[:200]]
    expected, run = [], list[str]()
    for path in PATHS[:200]:
        run.append(path)
        if len(run) == 16 or path_hash(path) % 16 == 0:
            expected.append(tuple(run))
            run = []
    expected += [tuple(run)] if run else []
    found = list(file_runs(listed, 16, Cuts.MARKED, "salt"))
    assert [file.members for file in found] == expected
    assert (found[0].path, found[0].size) == (expected[0][0], 10 * len(expected[0]))
    assert found[0].stamp == "55aaf28e2993b41080b49c12"
